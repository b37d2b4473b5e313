"""Every policy on real weights over real MPI ranks: REAL, on whatever machine this is. More ranks than cores measure
how they share them, not what a cluster would do.

    python -m launch.mpiexec -n 4 -- python -m benchmarks.real --prompts 4 --repeats 3

Policies take turns, prompt by prompt, and all tokens must equal the first policy's. Medians over prompts and repeats.
``ece`` is the expected calibration error of the guesses' probabilities as claimed and as believed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from launch.mpi import World
from pipeinfer import Engine, Sampling
from pipeinfer.engine import Completion
from pipeinfer.metrics import percentile

HERE = Path(__file__).parent
POLICIES = "plain,sync-chain,sync-tree,pipeinfer,continuous,no-tree,no-cancel,no-reuse,one-run"
COLUMNS = (
    "tokens/s", "p10", "p90", "ratio", "ttft_ms", "acc_rate", "acc_len", "waste", "cancel_ms", "ece_said", "ece_now",
)  # fmt: skip


def measure_policy(name: str, prompts: list[str], args: argparse.Namespace) -> list[Completion]:
    """One pass over the prompts; nothing on ranks other than the head."""
    file = HERE / "baselines" / f"{name}.toml"
    policy = str(file) if file.is_file() else name
    sampling = Sampling(temperature=args.temperature, seed=args.seed)
    with Engine(args.target, args.draft, policy=policy, settings=args.set, dtype=args.dtype, comm=args.comm) as engine:
        if engine is None:
            return []
        engine.generate(prompts[0], 8, ignore_eos=True)  # nobody is measured cold
        return [engine.generate(prompt, args.tokens, ignore_eos=True, sampling=sampling) for prompt in prompts]


def main() -> None:
    """Measure the policies in turn and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="builtin")
    parser.add_argument("--draft", help="default: the built-in pair's")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--policies", default=POLICIES, help="names or TOML files; the first is what others compare to")
    parser.add_argument("--set", action="append", default=[], metavar="KNOB=VALUE", help="a knob of every policy")
    parser.add_argument("--prompts", type=int, default=4, help="how many of benchmarks/prompts")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    world = World()
    args.comm = world.comm
    lines = (HERE / "prompts" / "python.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[: args.prompts]]
    names = args.policies.split(",")
    found: dict[str, list[Completion]] = {name: [] for name in names}
    for _ in range(args.repeats):
        for name in names:
            found[name] += measure_policy(name, prompts, args)
    if world.is_head:
        wanted = [completion.tokens for completion in found[names[0]]]
        for name in names:
            if [completion.tokens for completion in found[name]] != wanted:
                raise SystemExit(f"policy {name}: the tokens are not those of {names[0]}")
        report(names, found, args, world.size)
    world.close()


def report(names: list[str], found: dict[str, list[Completion]], args: argparse.Namespace, ranks: int) -> None:
    """Print medians; p10 and p90 of the speed."""
    what = f"{args.prompts} prompts x {args.tokens} tokens x {args.repeats}, temperature {args.temperature:g}"
    print(f"# {Path(args.target).name}, REAL: {ranks} MPI ranks, {args.dtype}, {what}; all tokens equal")
    print(f"# {'policy':<14}" + "".join(f" {column:>9}" for column in COLUMNS))
    base = 0.0
    for name in names:
        metrics: list[dict[str, Any]] = [completion.metrics for completion in found[name]]
        speeds = [1e3 / one["tpot_ms"] for one in metrics]
        middle = percentile(speeds, 0.5)
        base = base or middle
        keys = ("ttft_ms", "acceptance_rate", "accept_length", "waste", "cancel_latency_ms")
        others = [percentile([one[key] for one in metrics], 0.5) for key in keys]
        errors = [metrics[-1]["calibration_error"][key] for key in ("claimed", "believed")]
        values = [middle, percentile(speeds, 0.1), percentile(speeds, 0.9), middle / base, *others, *errors]
        print(f"{Path(name).stem:<16}" + "".join(f" {value:>9.3f}" for value in values))


if __name__ == "__main__":
    main()
