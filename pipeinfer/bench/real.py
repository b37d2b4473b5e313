"""Suites on real weights over real ranks, on whatever machine this is; peers decode in the head's process."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from itertools import chain, cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.collector import frozen
from launch.cores import usable_cores
from pipeinfer.bench.contenders import Contender, contender
from pipeinfer.bench.peers import Peer, is_peer, may_differ, open_peer
from pipeinfer.bench.rows import make_row
from pipeinfer.bench.sample import Sample, sample
from pipeinfer.bench.suite import Point, Suite
from pipeinfer.core.config import BUILTIN, model_directory, resolve_dtype
from pipeinfer.core.errors import PipeinferError
from pipeinfer.core.metrics import percentile
from pipeinfer.core.ports import RequestStats, Sampling
from pipeinfer.costs.paths import BENCHMARKS
from pipeinfer.engine.engine import Engine
from stages.checkpoint.spec import ModelSpec, is_llama_family, stored_dtype
from stages.kernels.library import library

if TYPE_CHECKING:
    from launch.mpi import World

WARM_TOKENS = 8
"""Of the first prompt, before anything is measured."""
INFLATED = f"{BUILTIN}*"
SHAPED = "shaped"
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
        common = _facts(world, here)
        bandwidth = _bandwidth(point.threads or world.threads) if world.is_head else 0.0
        prompts: list[list[int]] = []

        def opened(one: Contender, known: dict[str, Any]) -> None:
            weight_nbytes = known.pop("weight_nbytes")
            if not facts:
                common["ceiling_tokens_per_s"] = bandwidth / weight_nbytes
                announce(common["ceiling_tokens_per_s"])
            facts[one.name] = known

        for repeat in range(suite.repeats):
            for name in sorted(suite.policies, key=is_peer):  # an engine of ours reads the prompts
                if repeat and name in suite.once:
                    continue
                if not is_peer(name):
                    samples = measure_engine(world, here, contender(name, here.set), prompts, opened)
                else:
                    if world.is_head:
                        peers[name] = peers.get(name) or _open_peer(name, here, world)
                        samples = [measure_peer(peers[name], prompt, here.tokens) for prompt in prompts]
                    world.rest()
                found[name] += samples if world.is_head else []
        if not world.is_head:
            return []
        facts |= {name: {"peer": peer.facts} for name, peer in peers.items()}
        equal = _compare(found, common["dtype"])
        if suite.passes and world.size == 1:
            common |= _passes(suite, here, found, prompts, world.threads, common["dtype"])
        return [
            make_row(
                suite, point, name, samples,
                common | facts.get(name, {}) | {"equal_prefix": equal[name]},
                not is_peer(name),
            )
            for name, samples in found.items()
        ]  # fmt: skip


def _compare(found: dict[str, list[Sample]], dtype: str) -> dict[str, float]:
    """Of each policy and peer, the usual share of a text before the first token that is not ours. Raises PipeinferError
    where there is one that must not be."""
    ours = next(name for name in found if not is_peer(name))
    shares: dict[str, float] = {}
    for name, samples in found.items():
        each = [_equal_prefix(one.tokens, wanted.tokens) for one, wanted in zip(samples, found[ours], strict=False)]
        if min(each) < 1 and not may_differ(name, dtype):
            raise PipeinferError(f"the tokens of {name} are not those of {ours}")
        shares[name] = percentile(each, 0.5)
    return shares


def _equal_prefix(tokens: Sequence[int], wanted: Sequence[int]) -> float:
    pairs = enumerate(zip(tokens, wanted, strict=True))
    return next((index for index, (token, other) in pairs if token != other), len(wanted)) / len(wanted)


def _passes(
    suite: Suite, here: Point, found: dict[str, list[Sample]], prompts: list[list[int]], threads: int, dtype: str
) -> dict[str, Any]:
    """Times of single passes, and the ideal that follows from them and from plain decoding, if it was measured. Nothing
    without a draft, or where a model has no shard of its own."""
    from pipeinfer.bench.pair_passes import measure_pair

    ours = next(name for name in found if not is_peer(name))
    beside = any(name.startswith("llama.cpp") for name in suite.policies)
    if not here.draft:
        return {}
    pair = (model_directory(here.target, "target"), model_directory(here.draft, "draft"))
    if not all(map(_has_own_shard, pair)):
        return {}
    known = measure_pair(*pair, dtype, threads, prompts[0], found[ours][0].tokens, beside)
    plain = percentile([one.speed for one in found["plain"]], 0.5) if "plain" in found else None
    return {"passes": known, "ideal_tokens_per_s": plain and plain * known["gain"]}


def _has_own_shard(folder: Path) -> bool:
    """Whether a shard of ours, and not transformers' code, computes the model in ``folder``."""
    return is_llama_family(folder) and (library() is not None or ModelSpec.read(folder).experts is None)


@contextmanager
def models_of(world: World, point: Point) -> Iterator[Point]:
    """``point`` with its models as directories that this rank can read; what is made for it is removed in the end."""
    target, draft = point.target or BUILTIN, point.draft
    with ExitStack() as held:
        if target.startswith(INFLATED) or target == SHAPED:

            def make() -> str:
                if target == SHAPED:
                    return _shaped()
                from pipeinfer.bench.inflate import inflate

                place = held.enter_context(tempfile.TemporaryDirectory(prefix="pipeinfer-inflated-"))
                inflate(target.removeprefix(INFLATED), Path(place) / "target")
                return place

            made = world.broadcast({"made": make() if world.is_head else ""})["made"]
            made = made if Path(made).is_dir() else make()  # on a host of its own
            draft = draft or (str(Path(made) / "draft") if target == SHAPED else BUILTIN)
            target = str(Path(made) / "target")
        yield replace(point, target=target, draft=draft)
        world.agree(0)  # nobody's files go before everybody is done with them


def _shaped() -> str:
    """The shaped pair, for all points of the suite: it takes a minute to make. It goes when this process ends."""
    from pipeinfer.bench.shaped_pair import make_pair

    pair = Path(_scratch().name) / "pair"
    make_pair(pair)
    return str(pair)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="pipeinfer-shaped-")


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
            numerics=point.numerics,
            activations=point.activations,
            threads=point.threads or None,
            tp=point.tp,
            fused=point.fused,
            comm=world.comm,
            forced_acceptance=point.acceptance or ((point.top1,) if point.top1 else ()),
            random_weights=point.random_weights,
            max_num_seqs=1,
            prefix_caching=False,
        ) as engine,
    ):
        if engine is None:
            return []
        holders = [rank for rank in engine.ranks if rank["layers"] is not None]
        opened(one, {
            "settings": one.settings(),
            "dtype": engine.config.dtype,
            "threads": engine.ranks[0]["threads"],
            "stages": len({tuple(rank["layers"]) for rank in holders}),
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


def _open_peer(name: str, point: Point, world: World) -> Peer:
    """The peer ``name`` with the models and dtypes that our engines have, and as many threads as the ranks of ``world``
    have together, if there are cores for them."""
    directories = model_directory(point.target, "target"), model_directory(point.draft or BUILTIN, "draft")
    dtypes = [resolve_dtype(point.dtype, stored_dtype(directory), world.has_kernels) for directory in directories]
    threads = min((point.threads or world.threads) * world.size, usable_cores())
    return open_peer(name, *directories, dtypes[0], threads, dtypes[1])


def measure_peer(peer: Peer, prompt: list[int], count: int) -> Sample:
    """One sample of ``peer``; its thread count is for it alone."""
    tokens, emitted_at, began_at = peer.generate(prompt, count)
    return sample(tokens, began_at, emitted_at, RequestStats())


def _bandwidth(threads: int) -> float:
    """Bytes per second that ``threads`` threads of this host read: no plain decoding reads its weights faster."""
    from pipeinfer.bench.measure import Probe
    from pipeinfer.bench.passes import use_threads

    use_threads(threads)
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
        "dtype": resolve_dtype(point.dtype, stored_dtype(model_directory(point.target, "target")), world.has_kernels),
        "numerics": point.numerics,
        "activations": point.activations,
        "threads": point.threads or world.threads,
        "tp": point.tp if point.tp > 1 else None,
        "fused": point.fused if point.tp > 1 else None,
        "prompt_tokens": point.prompt_tokens or None,
        "set": list(point.set),
        "claims": [],
        "burst": [],
        "settings": {},
        "ideal_tokens_per_s": None,
        "ideal_samples": [],
        "ceiling_tokens_per_s": None,
        "bytes_per_rank": None,
        "peer": None,
        "passes": None,
    }
