"""Paced pipeline over real MPI: what asynchronous speculation gains when stages take a given time. EMULATED: the target
is a hash chain and every stage sleeps to its pace, so that many ranks fit on few cores; messages, machines, transport
and tokens are real, and every run's tokens are checked against the chain computed alone.

    python -m launch.mpiexec -n 9 -- python -m benchmarks.paced --stage-ms 20 --acceptance 0.8

Plain decoding gets the drafter's rank as a further stage of equal work per layer when --equal-ranks is given; by
default both policies run on the same number of stages.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

from launch.job import Job
from launch.mpi import World
from launch.roles import Plan, Role
from pipeinfer.config import Config
from pipeinfer.metrics import measure, percentile
from pipeinfer.ports import Request
from pipeinfer.protocol import ORCHESTRATOR, drafter_address, stage_address
from speculation.policy import CONTINUOUS, PLAIN, Policy
from stages.emulated import EmulatedPair, EmulatedSpec, plain_tokens, spread

LAYERS_PER_STAGE = 10


@dataclass(frozen=True, slots=True)
class Point:
    """One measured request."""

    policy: str
    tokens_per_s: float
    metrics: dict[str, float]


def plan_for(ranks: int, policy: Policy, equal_ranks: bool) -> Plan:
    """Rank 0 leads (and drafts); the others are stages. ``equal_ranks``: plain uses rank 0 as a stage too."""
    drafter = (Role(drafter_address(0)),) if policy.speculate else ()
    stages = ranks if equal_ranks and not policy.speculate else ranks - 1
    layers = LAYERS_PER_STAGE * (ranks - 1)
    shares = [range(layers * index // stages, layers * (index + 1) // stages) for index in range(stages)]
    roles = [Role(stage_address(index), share) for index, share in enumerate(shares)]
    head = (Role(ORCHESTRATOR), *drafter, *(roles[: stages - ranks + 1]))
    return (head, *((role,) for role in roles[len(roles) - (ranks - 1) :]))


def measure_once(world: World, policy: Policy, args: argparse.Namespace, prompt: tuple[int, ...]) -> Point | None:
    """Decode ``prompt`` under ``policy``; None on ranks other than the head."""
    ranks = spread(args.acceptance) if args.tree else (args.acceptance,)
    claims = tuple(args.claims) if args.claims else None
    spec = EmulatedSpec(layers=LAYERS_PER_STAGE * (world.size - 1), seed=args.seed, ranks=ranks, claims=claims)
    layer_s, draft_s = 1e-3 * args.stage_ms / LAYERS_PER_STAGE, 1e-3 * args.stage_ms * args.draft_time
    pair = EmulatedPair(spec, lambda rows, context: layer_s, lambda rows, context: draft_s)
    plan = plan_for(world.size, policy, args.equal_ranks)
    context = len(prompt) + args.tokens
    job = Job(Config(policy=policy.settings()), plan, context, pair, world, policy)
    if not world.is_head:
        job.serve()
        return None
    tokens, emitted_at, began = list[int](), list[tuple[float, int]](), 0.0
    for news in job.submit(Request(prompt, args.tokens)):
        began = began or news.at_s
        if news.tokens:
            tokens += news.tokens
            emitted_at.append((news.at_s, len(news.tokens)))
        if news.tally:
            metrics = measure(began, emitted_at, news.tally)
    job.close()
    if tokens != plain_tokens(spec, prompt, args.tokens, frozenset()):
        raise SystemExit(f"policy {policy.name}: the tokens are not those of plain decoding")
    return Point(policy.name, 1e3 / metrics["tpot_ms"], metrics)


def main() -> None:
    """Measure both policies in turn and print one row for each, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage-ms", type=float, default=20.0, help="time of one pass of a stage")
    parser.add_argument(
        "--acceptance", type=float, default=0.8, help="forced: how often the draft's first choice is right"
    )
    parser.add_argument(
        "--claims", type=float, nargs="*", help="what the draft believes of its ranks (default: the truth)"
    )
    parser.add_argument(
        "--tree", action="store_true", help="the draft's later choices may be right too (ranks spread out)"
    )
    parser.add_argument("--draft-time", type=float, default=0.5, help="one draft pass, in stage times")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--equal-ranks", action="store_true", help="plain also gets the drafter's rank, as a stage")
    args = parser.parse_args()
    world = World()
    points: list[Point] = []
    started = time.monotonic()
    for repeat in range(args.repeats):
        for policy in (PLAIN, CONTINUOUS):
            point = measure_once(world, policy, args, (1, 2, 3, repeat))
            points += [point] if point else []
    if world.is_head:
        report(points, args, world.size, time.monotonic() - started)
    world.close()


def report(points: list[Point], args: argparse.Namespace, ranks: int, seconds: float) -> None:
    """Print medians and spread."""
    print(
        f"# paced pipeline, EMULATED: {ranks} MPI ranks, {ranks - 1} stages of {args.stage_ms:g} ms, drafter "
        f"{args.draft_time:g} stage times per pass, forced acceptance {args.acceptance:g}; tokens checked; "
        f"{seconds:.0f} s"
    )
    columns = ("tokens/s", "min", "max", "ratio", "ttft_ms", "acc_len", "waste")
    print(f"# {'policy':<12}" + "".join(f" {column:>9}" for column in columns))
    base = percentile([p.tokens_per_s for p in points if p.policy == "plain"], 0.5)
    for name in ("plain", "continuous"):
        mine = [point for point in points if point.policy == name]
        speeds = [point.tokens_per_s for point in mine]
        middle = percentile(speeds, 0.5)
        ttft, length, waste = (
            percentile([p.metrics[key] for p in mine], 0.5) for key in ("ttft_ms", "accept_length", "waste")
        )
        values = (middle, min(speeds), max(speeds), middle / base, ttft, length, waste)
        print(f"{name:<14}" + "".join(f" {value:>9.3f}" for value in values))


if __name__ == "__main__":
    main()
