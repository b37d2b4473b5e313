"""Every policy against plain decoding in the simulator: SIMULATED, virtual time, no cost of messages or of Python.

Stages take one unit of time for a run of any size. The draft's choices are right with the probabilities of
stages.emulated.spread, and its passes take ``--draft-time`` units. Every token is checked against plain decoding.
The rivals are those of benchmarks/baselines at their best size for the cell: synchronous ones by their closed forms
(trees of up to 16 rows, at flat cost), PipeInfer's schedule by trying its micro-batch and its head's share of layers.
``continuous`` is the built-in policy, untuned. ``ideal`` is the reference of benchmarks/ideal.py.

    python -m benchmarks.simulated --table            the whole table: minutes
    python -m benchmarks.simulated --stages 8 --top1 0.79 --draft-time 0.5 --policies continuous,plain
    python -m benchmarks.simulated --burst 16 0.6     errors that come together
    python -m benchmarks.simulated --claims 0.4 0.3 0.2 0.1    a draft that is wrong about itself
"""

from __future__ import annotations

import argparse
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from pipeinfer.bench.ideal import ideal
from pipeinfer.ports import Request
from pipeinfer.sim.world import World, WorldSpec
from speculation.policy import Policy, read_policy
from stages.emulated import EmulatedSpec, plain_tokens, spread

BASELINES = Path(__file__).parent / "baselines"
COLUMNS = ("plain", "sync-chain", "sync-tree", "pipeinfer", "pipeinfer-shipped", "continuous", "ideal")
RIVALS = COLUMNS[:5]
HEAD_SHARES = (1.0, 2 / 3)
"""Layers of PipeInfer's first stage, in those of another; its script gives it two thirds."""
TABLE = {"stages": [4, 8, 16, 32], "top1": [0.5, 0.66, 0.79, 0.9], "draft_time": [0.1, 0.5, 1.0]}


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the table."""

    stages: int
    top1: float
    draft_time: float
    tokens: int
    burst: tuple[int, float] = (1, 0.0)
    claims: tuple[float, ...] | None = None


def baseline(name: str) -> Policy:
    """A policy by its name: built in, or one of benchmarks/baselines."""
    path = BASELINES / f"{name}.toml"
    return read_policy(str(path) if path.is_file() else name)


def speed(policy: Policy, cell: Cell, seed: int, head_share: float = 1.0) -> float:
    """Tokens per trip through the pipeline, which is what plain decoding needs for one."""
    ranks = spread(cell.top1)
    model = EmulatedSpec(4 * cell.stages, 5000, seed, ranks, cell.claims, cell.burst)
    request = Request((1, 2, 3 + seed), cell.tokens)
    other = (cell.stages - head_share) / max(1, cell.stages - 1)
    stage_s = (1.0,) if head_share == 1.0 else (head_share, *[other] * (cell.stages - 1))
    spec = WorldSpec(
        seed, policy, cell.stages, (request,), model, stage_s, draft_s=cell.draft_time, context=cell.tokens + 8,
        drafter_beside_orchestrator=policy.schedule != "frontier",
    )  # fmt: skip
    (answer,) = World(spec).run()
    if answer.tokens != plain_tokens(model, request.prompt, cell.tokens, request.stop_tokens):
        raise SystemExit(f"seed {seed}, policy {policy.name}: the tokens are not those of plain decoding")
    return cell.stages * (len(answer.tokens) - 1) / (answer.emitted_at[-1][0] - answer.emitted_at[0][0])


def tuned(name: str, cell: Cell) -> list[tuple[Policy, float]]:
    """The sizes of policy ``name`` among which the best one for ``cell`` is, with the head's share of layers."""
    if name == "sync-chain":
        length = best_chain(cell.stages, cell.top1, cell.draft_time)
        return [(replace(baseline(name), levels=length, rows=length + 1), 1.0)]
    if name == "sync-tree":
        levels, rows = best_tree(cell.stages, spread(cell.top1), cell.draft_time)
        return [(replace(baseline(name), levels=levels, rows=rows), 1.0)]
    if name == "pipeinfer":
        return [(replace(baseline(name), rows=rows), share) for rows in (2, 3, 4, 6) for share in HEAD_SHARES]
    if name == "pipeinfer-shipped":
        return [(baseline("pipeinfer"), HEAD_SHARES[1])]
    return [(baseline(name), 1.0)]


class Farm:
    """Runs simulations on all cores."""

    def __init__(self, pool: ProcessPoolExecutor, seeds: int) -> None:
        self._pool, self._seeds = pool, seeds

    def ask(self, name: str, cell: Cell) -> Callable[[], list[float]]:
        """The speeds of policy ``name`` for each seed, once they are called for."""
        if name == "ideal":
            ranks = spread(cell.top1)
            # Four times as many tokens: it is quick, and a reference should not be lucky.
            asked = [
                self._pool.submit(ideal, cell.stages, 8, ranks, cell.draft_time, tokens=4 * cell.tokens, seed=seed)
                for seed in range(self._seeds)
            ]
            return lambda: [cell.stages * job.result() for job in asked]
        options = tuned(name, cell)
        if len(options) == 1:
            jobs = self._ask_one(*options[0], cell)
            return lambda: [job.result() for job in jobs]
        trials = [self._pool.submit(speed, policy, cell, 99, share) for policy, share in options]

        def best() -> list[float]:
            speeds = [trial.result() for trial in trials]
            return [job.result() for job in self._ask_one(*options[speeds.index(max(speeds))], cell)]

        return best

    def _ask_one(self, policy: Policy, share: float, cell: Cell) -> list[Future[float]]:
        seeds = range(1 if policy.name == "plain" else self._seeds)
        return [self._pool.submit(speed, policy, cell, seed, share) for seed in seeds]


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    points = TABLE if args.table else {name: getattr(args, name) for name in TABLE}
    burst = (int(args.burst[0]), args.burst[1]) if args.burst else (1, 0.0)
    for stages in points["stages"]:
        for top1 in points["top1"]:
            for draft_time in points["draft_time"]:
                yield Cell(int(stages), top1, draft_time, args.tokens, burst, tuple(args.claims or ()) or None)


def main() -> None:
    """Print one row for each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="4 to 32 stages, top-1 0.5 to 0.9, drafts of 0.1 to 1.0")
    parser.add_argument("--stages", type=int, nargs="+", default=[8])
    parser.add_argument("--top1", type=float, nargs="+", default=[0.79], help="how often the first choice is right")
    parser.add_argument("--draft-time", type=float, nargs="+", default=[0.1, 0.5, 1.0], help="in stage times per pass")
    parser.add_argument("--burst", type=float, nargs=2, metavar=("TOKENS", "SHARE"), help="see EmulatedSpec.burst")
    parser.add_argument("--claims", type=float, nargs="+", help="what the draft believes of its ranks")
    parser.add_argument("--policies", default=",".join(COLUMNS), help="names, or TOML files, separated by commas")
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    names = args.policies.split(",")
    print(f"# ratio to plain, SIMULATED, flat cost, {args.seeds} seeds of {args.tokens} tokens; tokens checked")
    columns = "".join(f" {Path(name).stem:>17}" for name in names)
    print(f"# {'stages':>6} {'top1':>5} {'draft':>5}{columns} {'sd':>5} {'/ideal':>7} {'/best rival':>11}")
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        farm, asked = Farm(pool, args.seeds), deque[tuple[Cell, list[Callable[[], list[float]]]]]()

        def tell() -> None:
            cell, answers = asked.popleft()
            print(row(cell, dict(zip(names, [answer() for answer in answers], strict=True))), flush=True)

        for cell in cells(args):
            asked.append((cell, [farm.ask(name, cell) for name in names]))
            if len(asked) > 2:  # while one cell is awaited the next ones keep the pool busy
                tell()
        while asked:
            tell()


def row(cell: Cell, found: dict[str, list[float]]) -> str:
    """The means, the spread of continuous, and what it is of the ideal and of the best rival."""
    means = {name: statistics.mean(speeds) for name, speeds in found.items()}
    line = f"{cell.stages:>8} {cell.top1:>5.2f} {cell.draft_time:>5.2f}"
    line += "".join(f" {mean:>17.2f}" for mean in means.values())
    ours = means.get("continuous")
    if ours is None:
        return line
    rival = max((means[name] for name in RIVALS if name in means), default=0.0)
    line += f" {statistics.pstdev(found['continuous']):>5.2f}"
    line += f" {ours / means['ideal']:>7.3f}" if "ideal" in means else " " * 8
    return line + (f" {ours / rival:>11.2f}" if rival else "")


if __name__ == "__main__":
    main()
