"""What continuous speculation gains in the simulator: SIMULATED, virtual time, no cost of messages or Python.

Stages take one unit of time for a run of any size, the draft model's choices are right with the probabilities of
stages.emulated.spread, and its passes take ``--draft-time`` units. Every token is checked against plain decoding.

    python -m benchmarks.simulated --stages 8 --top1 0.79 --draft-time 0.1 0.5 1.0
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from pipeinfer.ports import Request
from pipeinfer.sim.world import World, WorldSpec
from speculation.policy import CONTINUOUS, Policy
from stages.emulated import EmulatedSpec, plain_tokens, spread

WIDE = Policy("wide", rows=8, width=8, leaves=8, lead=112)
"""For stages that take eight rows as easily as one, as large models on few requests do."""


def ratio_to_plain(policy: Policy, stages: int, top1: float, draft_time: float, tokens: int, seed: int) -> float:
    """Tokens per trip through the pipeline, which is what plain decoding needs for one."""
    model = EmulatedSpec(layers=4 * stages, vocab=5000, seed=seed, ranks=spread(top1))
    request = Request((1, 2, 3 + seed), tokens)
    world = World(WorldSpec(seed, policy, stages, (request,), model, draft_s=draft_time, context=tokens + 8))
    (answer,) = world.run()
    if answer.tokens != plain_tokens(model, request.prompt, tokens, request.stop_tokens):
        raise SystemExit(f"seed {seed}: the tokens are not those of plain decoding")
    return stages * (len(answer.tokens) - 1) / (answer.emitted_at[-1][0] - answer.emitted_at[0][0])


def main() -> None:
    """Print one row for each point and policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[8])
    parser.add_argument("--top1", type=float, nargs="+", default=[0.79])
    parser.add_argument("--draft-time", type=float, nargs="+", default=[0.1, 0.5, 1.0], help="in stage times per pass")
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    print(f"# continuous speculation against plain decoding, SIMULATED; {args.seeds} seeds of {args.tokens} tokens")
    print(f"# {'policy':<12} {'stages':>7} {'top1':>6} {'draft':>6} {'ratio':>7} {'min':>7} {'max':>7}")
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for stages in args.stages:
            for top1 in args.top1:
                for draft_time in args.draft_time:
                    for policy in (CONTINUOUS, WIDE):
                        jobs = [
                            pool.submit(ratio_to_plain, policy, stages, top1, draft_time, args.tokens, seed)
                            for seed in range(args.seeds)
                        ]
                        found = [job.result() for job in jobs]
                        print(
                            f"{policy.name:<14} {stages:>7} {top1:>6.2f} {draft_time:>6.2f} "
                            f"{statistics.mean(found):>7.2f} {min(found):>7.2f} {max(found):>7.2f}",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
