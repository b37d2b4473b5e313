"""Suites on real weights over real ranks, on whatever machine this is; peers decode in the head's process."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain, cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.collector import frozen
from pipeinfer.bench.contenders import Contender, contender
from pipeinfer.bench.peers import Peer, is_peer, open_peer
from pipeinfer.bench.rows import make_row
from pipeinfer.bench.sample import Sample, sample
from pipeinfer.bench.suite import Point, Suite
from pipeinfer.core.config import BUILTIN, model_directory
from pipeinfer.core.errors import PipeinferError
from pipeinfer.core.ports import RequestStats, Sampling
from pipeinfer.costs.paths import BENCHMARKS
from pipeinfer.engine.engine import Engine

if TYPE_CHECKING:
    from launch.mpi import World

WARM_TOKENS = 8
"""Of the first prompt, before anything is measured."""
INFLATED = f"{BUILTIN}*"
Opened = Callable[[Contender, dict[str, Any]], None]
"""Called with what is known of a contender before it decodes."""


def measure_point(world: World, suite: Suite, point: Point, announce: Callable[[float], None]) -> list[dict[str, Any]]:
    """The rows of all policies and peers at ``point``; none on ranks other than the head. Collective. ``announce`` is
    told once, before anything is measured, how many tokens per second plain decoding can have on this machine.

    Raises PipeinferError where tokens differ."""
    with models_of(world, point) as here:
        found: dict[str, list[Sample]] = {name: [] for name in suite.policies}
        peers: dict[str, Peer] = {}
        facts: dict[str, dict[str, Any]] = {}
        common = _facts(world, point)
        bandwidth = _bandwidth(world.threads) if world.is_head else 0.0
        prompts: list[list[int]] = []

        def opened(one: Contender, known: dict[str, Any]) -> None:
            weight_nbytes = known.pop("weight_nbytes")
            if not facts:
                common["ceiling_tokens_per_s"] = bandwidth / weight_nbytes
                announce(common["ceiling_tokens_per_s"])
            facts[one.name] = known

        for _ in range(suite.repeats):
            for name in sorted(suite.policies, key=is_peer):  # an engine of ours reads the prompts
                if not is_peer(name):
                    samples = measure_engine(world, here, contender(name, here.set), prompts, opened)
                else:
                    if world.is_head:
                        peers[name] = peers.get(name) or _open_peer(name, here, _threads(world))
                        samples = [measure_peer(peers[name], prompt, here.tokens) for prompt in prompts]
                    world.rest()
                found[name] += samples if world.is_head else []
        if not world.is_head:
            return []
        first = suite.policies[0]
        for name, samples in found.items():
            if [one.tokens for one in samples] != [one.tokens for one in found[first]]:
                raise PipeinferError(f"the tokens of {name} are not those of {first}")
        return [
            make_row(suite, point, name, samples, common | facts.get(name, {}), not is_peer(name))
            for name, samples in found.items()
        ]


@contextmanager
def models_of(world: World, point: Point) -> Iterator[Point]:
    """``point`` with its models as directories that this rank can read; what is made for it is removed in the end."""
    target, draft = point.target or BUILTIN, point.draft
    with ExitStack() as held:
        if target.startswith(INFLATED):
            from pipeinfer.bench.inflate import inflate

            def make() -> str:
                place = held.enter_context(tempfile.TemporaryDirectory(prefix="pipeinfer-inflated-"))
                inflate(target.removeprefix(INFLATED), Path(place) / "target")
                return str(Path(place) / "target")

            made = world.broadcast({"made": make() if world.is_head else ""})["made"]
            target = made if Path(made).is_dir() else make()  # on a host of its own
            draft = draft or BUILTIN
        yield replace(point, target=target, draft=draft)
        world.agree(0)  # nobody's files go before everybody is done with them


def measure_engine(
    world: World, point: Point, one: Contender, prompts: list[list[int]], opened: Opened
) -> list[Sample]:
    """One sample of ``one`` for each prompt; nothing on ranks other than the head. Leaves ``prompts`` as tokens for
    others."""
    with (
        frozen(),
        Engine(
            point.target,
            point.draft or None,
            policy=one.source,
            settings=one.changes,
            dtype=point.dtype,
            comm=world.comm,
            forced_acceptance=point.acceptance or ((point.top1,) if point.top1 else ()),
            random_weights=point.random_weights,
        ) as engine,
    ):
        if engine is None:
            return []
        holders = [rank for rank in engine.ranks if rank["layers"] is not None]
        opened(one, {
            "settings": one.settings(),
            "stages": len(holders),
            "bytes_per_rank": max(rank["weight_nbytes"] for rank in holders),
            "weight_nbytes": sum(rank["weight_nbytes"] for rank in holders),
        })  # fmt: skip
        prompts[:] = prompts or prompts_of(point, engine)
        sampling = Sampling(temperature=point.temperature)
        engine.generate(prompts[0], WARM_TOKENS, ignore_eos=True)
        answers = [engine.generate(prompt, point.tokens, ignore_eos=True, sampling=sampling) for prompt in prompts]
    messages, nbytes = (sent / (WARM_TOKENS + len(prompts) * point.tokens) for sent in engine.traffic)
    return [Sample(tuple(answer.tokens), answer.metrics, messages, nbytes) for answer in answers]


def prompts_of(point: Point, engine: Engine) -> list[list[int]]:
    """The prompts of ``point`` as tokens: the first of benchmarks/prompts, or texts of them as long as it asks."""
    lines = (BENCHMARKS / "prompts" / "python.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    if not point.prompt_tokens:
        return [engine.tokenize(text, point.tokens) for text in texts[: point.prompts]]
    tokens = [engine.tokenize(text, 1) for text in texts]
    turns = (tokens[index:] + tokens[:index] for index in range(point.prompts))
    return [list(islice(chain.from_iterable(cycle(turn)), point.prompt_tokens)) for turn in turns]


def _threads(world: World) -> int:
    """What a peer gets in its one process: as many threads as the ranks of ``world`` have together, if there are cores
    for them."""
    return min(world.threads * world.size, len(os.sched_getaffinity(0)))


def _open_peer(name: str, point: Point, threads: int) -> Peer:
    draft = model_directory(point.draft or BUILTIN, "draft")
    return open_peer(name, model_directory(point.target, "target"), draft, point.dtype, threads)


def measure_peer(peer: Peer, prompt: list[int], count: int) -> Sample:
    """One sample of ``peer``; its thread count is for it alone."""
    tokens, emitted_at, began_at = peer.generate(prompt, count)
    return sample(tokens, began_at, emitted_at, RequestStats())


def _bandwidth(threads: int) -> float:
    """Bytes per second that ``threads`` threads of this host read: no plain decoding reads its weights faster."""
    import torch

    from pipeinfer.bench.measure import Probe

    torch.set_num_threads(threads)
    return Probe("cpu").read_bandwidth()


def _facts(world: World, point: Point) -> dict[str, Any]:
    forced = point.acceptance or ((point.top1,) if point.top1 else ())
    return {
        "ranks": world.size,
        "stages": None,
        "acceptance": {"top1": forced[0], "ranks": list(forced)} if forced else None,
        "draft_time": None,
        "hardware": None,
        "target": point.target,
        "draft": point.draft or None,
        "dtype": point.dtype,
        "prompt_tokens": point.prompt_tokens or None,
        "set": list(point.set),
        "claims": [],
        "burst": [],
        "settings": {},
        "ideal_tokens_per_s": None,
        "ideal_samples": [],
        "ceiling_tokens_per_s": None,
        "bytes_per_rank": None,
    }
