"""What each adapter of the schedule is worth: speeds without it over speeds with it, simulated.

    python -m benchmarks.adapters --record          write benchmarks/traces/builtin.json again
    python -m benchmarks.adapters [NAME ...]        the table; of these adapters only

The draft guesses as the draft of the built-in pair did at the positions of texts that its target wrote
(pipeinfer/sim/recorded.py). Each adapter is taken away in turn: a knob of the policy is turned off, or a constant gets
the value with which its rule says nothing. Passes cost what those of 620M weights do by rows, or the same for any
number of rows, or are late at times: machines are. A draft that is always wrong shows what protects.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeinfer.bench.load import throughput
from pipeinfer.bench.scenario import Flat, Measured
from pipeinfer.core.ports import Request, Sampling
from pipeinfer.runtime.pass_times import ROWS
from pipeinfer.sim.recorded import Record, RecordedPair, read_records, write_records
from pipeinfer.sim.world import World, WorldSpec
from speculation.schedules.cost_curve import Priors
from speculation.schedules.policy import CONTINUOUS, PLAIN, Policy
from speculation.schedules.schedule import Placement
from stages.models.emulated import EmulatedSpec, Pace

HERE = Path(__file__).parent
TRACE = HERE / "traces" / "builtin.json"
PROMPTS = HERE / "prompts" / "python.jsonl"
TEXTS, TOKENS, CHOICES = 12, 120, 8
LAYERS, STAGE_S, DRAFT_TIME = 6, 0.057, 0.4
COSTS = (57.0, 73.0, 94.0, 120.0, 206.0, 348.0)
LATE, LATEST = 0.1, 3.0
"""Share of layers that are late where some are, and how many times as long the latest one takes."""
MOST_EVENTS = 100_000_000
BEGIN, END = 0.1, 0.8
NEVER = 1e9


MODULES = {"pacer": "stages.stage.pacer"}
IMPORTED = {"alternation": ("speculation.schedules.turns",)}
"""Modules that have the constants of another."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an adapter is taken away. ``costs``: "rows", "flat", "late", or "wrong" for a draft that is never right."""

    requests: int
    stages: int
    costs: str = "rows"
    placement: Placement = "spread"

    def __str__(self) -> str:
        return f"{self.requests} on {'one rank' if self.placement == 'alone' else self.stages}, {self.costs}"


ONE = [
    *(Place(1, stages) for stages in (1, 4, 8)),
    *(Place(1, stages, costs) for stages, costs in ((4, "flat"), (4, "late"), (8, "wrong"))),
]
MANY = [
    *(Place(requests, stages) for requests in (4, 8, 16) for stages in (1, 4, 8)),
    Place(8, 8, "flat"), Place(8, 4, "late"), Place(8, 8, "wrong"),
]  # fmt: skip
SOME = [Place(4, 8), Place(8, 4), Place(16, 4), Place(8, 4, "late"), Place(8, 8, "flat")]
"""Places of many requests where constants are taken away."""
ALONE = [*(Place(1, 1, costs, "alone") for costs in ("rows", "late", "wrong")), Place(4, 1, "rows", "alone")]


@dataclass(frozen=True, slots=True)
class Adapter:
    """Something that can be taken away, and the ``places`` where it acts. ``knobs`` of the policy, or ``constants`` of
    modules of speculation/schedules ("module.NAME"), get the values with which it is gone."""

    name: str
    places: Sequence[Place]
    knobs: tuple[tuple[str, Any], ...] = ()
    constants: tuple[tuple[str, Any], ...] = ()
    policy: Policy = CONTINUOUS


def knob(name: str, value: Any, places: Sequence[Place], policy: Policy = CONTINUOUS) -> Adapter:
    """A knob of ``policy``."""
    return Adapter(name if policy is CONTINUOUS else f"{name} ({policy.name})", places, ((name, value),), (), policy)


def constant(name: str, value: Any, places: Sequence[Place]) -> Adapter:
    """A constant."""
    return Adapter(f"{name} = {value}", places, (), ((name, value),))


STAKES = ("SPELL_TOKENS", "STAKE", "SMALL_STAKE")
ADAPTERS = [
    knob("govern", False, [*ONE, *MANY, *ALONE]),
    Adapter("gears", [*ONE, *ALONE], (), tuple((f"governor.{one}", NEVER) for one in STAKES)),
    knob("launch_delay", False, [*ONE, *ALONE]),
    knob("calibrate", False, [*ONE, *MANY, *ALONE]),
    Adapter("pacer", [*ONE, *MANY], (), (("pacer.SAFETY", NEVER),)),
    knob("balance", False, MANY),
    knob("balance", False, MANY, PLAIN),
    knob("min_path_prob", 0.0, [*ONE, *MANY]),
    *(constant(f"many.{name}", value, SOME) for name, value in (
        ("PIGGYBACK", 1.0), ("PIGGYBACK", NEVER), ("GUESS_RUN", 0.0), ("GUESS_RUN", 1.0), ("LONGEST", NEVER),
        ("ROWS", 1),
    )),
    *(constant(f"drafting.{name}", value, SOME) for name, value in (
        ("TOGETHER", 0.0), ("RIGHT_WEIGHT", 0.0), ("GRACE", 1.0), ("WEIGHT", 1.0),
    )),
    *(constant(f"traffic.{name}", value, SOME) for name, value in (("FIRST", 1), ("SPAN", 300))),
    *(constant(f"launch_delay.{name}", value, ONE) for name, value in (
        ("JUST_BEGUN", 1.0), ("GRACE", 1.0), ("TRIAL", 0.0), ("WEIGHT", 1.0), ("FORGET", 1.0),
    )),
    *(constant(f"alternation.{name}", value, ALONE) for name, value in (
        ("FAR", 1), ("MOST_LATE", NEVER), ("WEIGHT", 1.0), ("FORGET", 1.0), ("TRIES", 0.1), ("PATIENCE", 10**9),
    )),
    *(constant(f"cost_curve.{name}", value, [*ONE, *SOME]) for name, value in (
        ("BEND", 0.0), ("FIXED", 0.0), ("FIXED", 1.0), ("MOST_LATE", NEVER),
        ("FORGET", 1.0), ("WEIGHT", 1.0), ("PRIOR_WEIGHT", 1.0),
    )),
    *(constant(f"governor.{name}", value, ONE) for name, value in (
        ("HYSTERESIS", 0.0), ("PLAIN_HYSTERESIS", 0.04), ("NEAR", 0.04), ("SHORTER", 1.0), ("SMALL_STAKE", 6),
        ("LATER", 2), ("LATE", 2), ("TRIPS", 4), ("MOST_SPELLS", 8),
    )),
    constant("continuous.LEAST_PROSPECT", 0.0, [*ONE, *ALONE]),
]  # fmt: skip


def late(pace: Pace, seed: int) -> Pace:
    """``pace`` with layers that are late at times."""
    rng = random.Random(seed)

    def seconds(rows: int, context: int) -> float:
        lot = rng.random()
        return pace(rows, context) * (1.0 + (LATEST - 1.0) * lot / LATE if lot < LATE else 1.0)

    return seconds


def world(place: Place, policy: Policy, seed: int) -> tuple[WorldSpec, RecordedPair]:
    """The requests of ``place``, and the pair."""
    each = LAYERS if place.stages > 1 else 3 * LAYERS
    layer: Pace = Measured(STAGE_S / each, COSTS)
    draft: Pace = Measured(DRAFT_TIME * STAGE_S, COSTS)
    if place.placement == "alone":
        draft = Measured(DRAFT_TIME / 4 * STAGE_S, COSTS)
    if place.costs == "flat":
        layer, draft = Flat(STAGE_S / each), Flat(DRAFT_TIME * STAGE_S)
    stage_s = [(rows, each * layer(rows, 0)) for rows in ROWS]
    priors = Priors(
        tuple(stage_s),
        tuple((rows, place.stages * seconds) for rows, seconds in stage_s),
        tuple((rows, draft(rows, 0)) for rows in ROWS) if policy.speculate else (),
    )
    if place.costs == "late":
        layer, draft = late(layer, seed), late(draft, seed + 1)
    records = read_records(TRACE)
    if place.costs == "wrong":
        records = [Record(one.claims, None) for one in records]
    count = TOKENS if place.requests == 1 else TOKENS // 2
    requests = tuple(
        Request((seed, number), count, sampling=Sampling(seed=31 * seed + number)) for number in range(place.requests)
    )
    spec = WorldSpec(
        seed, policy, place.stages, requests, EmulatedSpec(each * place.stages, 5000, seed), paces=(layer, draft),
        context=2 + count, placement=place.placement, priors=priors, max_num_seqs=place.requests, at_once=True,
    )  # fmt: skip
    return spec, RecordedPair(spec, records)


@contextmanager
def without(adapter: Adapter | None) -> Iterator[None]:
    """While the ``with`` lasts the constants of ``adapter`` say nothing."""
    old = list[tuple[Any, str, Any]]()
    for name, value in adapter.constants if adapter else ():
        module, attribute = name.split(".")
        for path in (MODULES.get(module, f"speculation.schedules.{module}"), *IMPORTED.get(module, ())):
            user = importlib.import_module(path)
            if hasattr(user, attribute):
                old.append((user, attribute, getattr(user, attribute)))
                setattr(user, attribute, value)
    try:
        yield
    finally:
        for user, attribute, value in old:
            setattr(user, attribute, value)


def speed(place: Place, policy: Policy, adapter: Adapter | None, seed: int) -> float:
    """Tokens per second of ``policy`` without ``adapter``."""
    chosen = replace(policy, **dict(adapter.knobs)) if adapter else policy
    with without(adapter):
        spec, pair = world(place, chosen, seed)
        answers = World(spec, pair=pair).run(MOST_EVENTS)
    return throughput(answers, BEGIN if place.requests > 1 else 0.0, END if place.requests > 1 else 1.0)


def record() -> list[Record]:
    """What the built-in draft thinks of texts that the built-in target writes."""
    from pipeinfer.bench.chain import ShardEvaluator, decode, run_pass
    from pipeinfer.bench.passes import whole_shard
    from pipeinfer.core.slots import batch_in_order
    from pipeinfer.text import Text
    from stages.checkpoint.checkpoint import Checkpoint
    from stages.checkpoint.spec import ModelSpec

    folders = [HERE.parent / "pipeinfer" / "builtin" / name for name in ("target", "draft")]
    text, found = Text(folders[0]), list[Record]()
    lines = PROMPTS.read_text().splitlines()
    for line in lines[:: len(lines) // TEXTS]:
        prompt = text.encode(json.loads(line)["prompt"])
        length = len(prompt) + TOKENS + 1
        target, draft = (whole_shard(ModelSpec.read(one), "fp32", length, Checkpoint(one)) for one in folders)
        tokens = [*prompt, *decode(ShardEvaluator(target), None, prompt, TOKENS)]
        rows = range(len(prompt) - 1, len(tokens) - 1)
        hidden = run_pass(draft, batch_in_order(tokens[:-1], 0))
        for row, choices in zip(rows, draft.sample(hidden, rows, CHOICES), strict=True):
            hit = next((rank for rank, (token, _) in enumerate(choices) if token == tokens[row + 1]), None)
            found.append(Record(tuple(claim for _, claim in choices), hit))
    return found


def table(adapters: Sequence[Adapter], seeds: int, processes: int, show: Callable[[str], object]) -> None:
    """A line for each adapter: what it is worth in percent, on average at each place, the least and the most."""
    places = list(dict.fromkeys((place, one.policy) for one in adapters for place in one.places))
    with ProcessPoolExecutor(processes) as pool:
        usual = {key: [pool.submit(speed, *key, None, seed) for seed in range(seeds)] for key in places}
        found = {
            one.name: {
                place: [pool.submit(speed, place, one.policy, one, seed) for seed in range(seeds)]
                for place in one.places
            }
            for one in adapters
        }  # fmt: skip
        for one in adapters:
            worth = []
            for place, jobs in found[one.name].items():
                pairs = zip(usual[place, one.policy], jobs, strict=True)
                gains = [100 * (old.result() / new.result() - 1) for old, new in pairs]
                worth.append((sum(gains) / len(gains), str(place)))
            least, most, mean = min(worth), max(worth), sum(gain for gain, _ in worth) / len(worth)
            show(f"| {one.name} | {mean:+.1f} | {most[0]:+.1f} ({most[1]}) | {least[0]:+.1f} ({least[1]}) |")


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description="what each adapter of the schedule is worth, simulated")
    parser.add_argument("names", nargs="*", metavar="NAME", help="adapters whose names contain this; default: all")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="texts of each place (default 3)")
    parser.add_argument("--processes", type=int, default=2, metavar="N")
    parser.add_argument("--record", action="store_true", help="only write the trace of the built-in pair again")
    args = parser.parse_args(arguments)
    if args.record:
        write_records(record(), TRACE)
        return 0
    chosen = [one for one in ADAPTERS if not args.names or any(name in one.name for name in args.names)]
    print("| without | worth %, mean | most (where) | least (where) |\n|--|--|--|--|", flush=True)
    table(chosen, args.seeds, args.processes, lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
