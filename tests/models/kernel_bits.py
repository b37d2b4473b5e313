"""Random models and texts on the C kernels: the same bits for a row alone and in every company.

A *world* is a small random model with a forest of texts. Its rows are computed one at a time, on one thread, in slots
in order: that is each row's truth. A *case* computes the same rows in a random company: in passes of other sizes and
orders, in other slots, cut elsewhere between canonical slots and ancestors, beside guesses that are given up or not$
even finite, on other threads, on another instruction set. Nothing may differ by a bit.

``python -m tests.models.kernel_bits --cases 10000 --seed 1`` looks through ten thousand cases."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeinfer.core.ports import Batch
from pipeinfer.core.slots import batch_in_order
from stages.checkpoint.checkpoint import EMBEDDING, HEAD, Weights, expected
from stages.checkpoint.spec import ModelSpec, RopeSpec
from stages.kernels.library import Library, library
from stages.models.kernel_shard import KernelShard
from tests.models.kinds_of_choices import KINDS, say

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HIDDEN = (64, 80, 896, 1536, 65, 128, 30)
INNER = (4864, 200, 112, 64, 33, 1000)
HEADS = (
    *((64, 1, 1), (64, 2, 2), (96, 2, 1), (80, 1, 3), (6, 2, 5)),
    *((6, 8, 1), (16, 1, 4), (24, 2, 7), (128, 1, 2), (10, 3, 1)),
)
"""Their size, key heads, queries of each."""
VOCABULARY = (512, 300, 257, 40, 1000)
MOST_WEIGHTS = 2_000_000
"""Of a layer: larger ones are drawn again."""
MOST_ROWS = 40
CASES_PER_WORLD = 20


class RandomWeights(Weights):
    """Of numbers that are the same on any machine; norms and biases are random too. ``bad``: a token whose embedding is
    not finite."""

    def __init__(self, spec: ModelSpec, seed: int, bad: int | None) -> None:
        self.shapes, self.seed, self.bad = dict(expected(spec)), seed, bad

    def stored_name(self, name: str) -> str:
        return name if name in self.shapes else {HEAD: EMBEDDING, EMBEDDING: HEAD}[name]

    def read(self, names: Iterable[str], dtype: torch.dtype, slices: Any = None) -> dict[str, Tensor]:
        return {name: self._tensor(name)[slices[name] if slices else ...].to(dtype).clone() for name in names}

    def _tensor(self, name: str) -> Tensor:
        shape, digest = self.shapes[name], hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8])))
        numbers = generator.integers(-32768, 32768, shape, np.int16)
        if "norm" in name:
            return torch.from_numpy(numbers).float() * (0.4 / 32768) + 1.0
        size = 0.2 if name.endswith("bias") else 1.5 if name == EMBEDDING else 2.5 * shape[-1] ** -0.5
        found = torch.from_numpy(numbers).float() * (size / 32768)
        if name == EMBEDDING and self.bad is not None:
            found[self.bad, self.seed % shape[-1]] = (torch.nan, torch.inf)[self.seed % 2]
        return found


@dataclass(slots=True)
class World:
    """``parents``: of each row of the forest the row before it, or -1. ``vocabulary``: see KernelShard.load.
    ``activations``: what the first and the last shard left of each row, alone; ``logits`` and ``said``: what was chosen
    after it. ``arithmetic``: with quantised weights, the ``activations`` of Library."""

    seed: int
    spec: ModelSpec
    dtype: torch.dtype
    weights: RandomWeights
    cuts: list[range]
    parents: list[int]
    tokens: list[int]
    vocabulary: int | None
    paths: list[list[int]] = field(default_factory=list)
    activations: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    arithmetic: str = "fp32"
    said: dict[tuple[int, str], Any] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = f"hidden {self.spec.hidden_size}, inner {self.spec.intermediate_size}, {self.spec.layer_count} layers"
        heads = f"heads of {self.spec.head_dim}: {self.spec.head_count} on {self.spec.kv_head_count}"
        return f"world {self.seed}: {sizes}, {heads}, {self.dtype}, {len(self.tokens)} rows"


def draw_spec(dice: random.Random) -> ModelSpec:
    """A model of some layers, of a family, with odd sizes now and then."""
    while True:
        size, kv_heads, copies = dice.choice(HEADS)
        hidden, inner, heads = dice.choice(HIDDEN), dice.choice(INNER), kv_heads * copies
        if hidden * (3 * inner + size * (2 * heads + 2 * kv_heads)) <= MOST_WEIGHTS:
            break
    return ModelSpec(
        architecture="LlamaForCausalLM",
        vocab_size=dice.choice(VOCABULARY),
        hidden_size=hidden,
        intermediate_size=inner,
        layer_count=dice.choice((1, 2, 3)),
        head_count=heads,
        kv_head_count=kv_heads,
        head_dim=size,
        context=2048,
        norm_eps=dice.choice((1e-6, 1e-5)),
        tied=dice.random() < 0.5,
        qkv_bias=dice.random() < 0.4,
        output_bias=dice.random() < 0.3,
        mlp_bias=dice.random() < 0.3,
        qk_norm=dice.random() < 0.4,
        rope=RopeSpec(theta=dice.choice((1e4, 5e5))),
        eos_tokens=(),
        dtype=None,
    )


def draw_world(seed: int, long_texts: bool = True) -> World:
    """A model and a forest: some texts, with guesses that branch off; now and then one of some chunks of attention."""
    dice = random.Random(f"world {seed}")
    spec = draw_spec(dice)
    cut = dice.randint(0, spec.layer_count - 1)
    cuts = [range(cut), range(cut, spec.layer_count)] if cut else [range(spec.layer_count)]
    parents: list[int] = []
    for _ in range(dice.choice((1, 1, 2, 3))):
        length = dice.randint(250, 600) if long_texts and dice.random() < 0.1 else dice.randint(1, 40)
        for place in range(length):
            parents.append(len(parents) - 1 if place else -1)
    texts = len(parents)
    for _ in range(dice.randint(0, 20)):
        parents.append(dice.choice((dice.randrange(texts), dice.randrange(len(parents)))))
    bad = None if spec.tied or dice.random() < 0.4 else dice.randrange(spec.vocab_size)
    size, first = spec.vocab_size, 0 if bad is None else bad + 1
    tokens = [(first + dice.randrange(size - (bad is not None))) % size for _ in parents]
    vocabulary = dice.choice((None, None, spec.vocab_size - 3, spec.vocab_size + 5))
    world = World(seed, spec, dice.choice(DTYPES), RandomWeights(spec, seed, bad), cuts, parents, tokens, vocabulary)
    for row, parent in enumerate(parents):
        world.paths.append([*(world.paths[parent] if parent >= 0 else []), row])
    return world


@contextlib.contextmanager
def used(lib: Library | None, arithmetic: str = "fp32") -> Iterator[None]:
    """Shards and linear layers are those of ``lib`` and not of the library in use."""
    with pytest.MonkeyPatch.context() as patch:
        if lib is not None:
            for module in ("stages.models.kernel_shard", "stages.kernels.linear"):
                patch.setattr(f"{module}.library", lambda: lib)
        patch.setattr(lib or library(), "activations", arithmetic)
        yield


def load(world: World, lib: Library | None = None, spare: int = 60) -> list[KernelShard]:
    """The shards of a world's model, with ``spare`` slots more than rows; every number in every slot is NaN."""
    with used(lib, world.arithmetic):
        capacity = len(world.tokens) + spare
        sizes = world.dtype, capacity, world.vocabulary
        shards = [KernelShard.load(world.spec, world.weights, layers, *sizes) for layers in world.cuts]
    return forgotten(shards)


@torch.inference_mode()
def forgotten(shards: list[KernelShard]) -> list[KernelShard]:
    """What no row may read: everything but its own slots."""
    for shard in shards:
        shard._kv.fill_(torch.nan)
    return shards


def push(shards: Sequence[KernelShard], batch: Batch, bad: Sequence[int] = (), hidden: Any = None) -> list[Tensor]:
    """What each shard leaves of the rows of ``batch``; ``bad``: those that are not finite from the first layer on.
    ``hidden``: what the first shard is given, unless it embeds."""
    found: list[Tensor] = []
    for shard in shards:
        steps = shard.forward(batch, found[-1] if found else hidden)
        try:
            while True:
                next(steps)
        except StopIteration as end:
            found.append(end.value)
        assert shard.faults == ({} if len(found) > 1 else dict.fromkeys(bad, 0)), f"rows {shard.faults} are not finite"
        assert len(found) > 1 or not found[-1][list(bad)].any(), "what is not finite goes on as zeros"
    return found


def logits_of(shard: KernelShard, hidden: Tensor) -> tuple[Tensor, list[int]]:
    """All logits of some rows, and the best token of each."""
    chosen, logits = shard.choose(hidden.contiguous(), None, 2)
    assert logits is not None
    return logits, chosen["token"].tolist()


def learn(world: World, shards: Sequence[KernelShard], lib: Library, isa: str) -> World:
    """Compute the world's rows one at a time, and note what came out."""
    lib.set_threads(1)
    lib.use(isa)
    passes = []
    for row, path in enumerate(world.paths):
        one = batch_in_order([world.tokens[row]], len(path) - 1)
        own, lists = np.array([row]), np.array(path)
        nothing = np.zeros((0, 2), np.int64), np.zeros(1, np.int64)
        rest = nothing[1], nothing[1], lists, np.array([len(path)])
        batch = Batch(one.tokens, one.positions, own, nothing[:1], *rest)
        passes.append(push(shards, batch))
    world.activations = [torch.cat(outs) for outs in zip(*passes, strict=True)]
    chosen = [logits_of(shards[-1], outs[-1]) for outs in passes]
    world.logits = torch.cat([logits for logits, _ in chosen])
    world.said = {}
    for row, outs in enumerate(passes):
        for kind in KINDS:
            world.said[row, kind] = say(shards[-1], outs[-1], [0], [len(world.paths[row])], kind)[0]
        assert world.said[row, "best"][0][0] == int(world.logits[row].argmax()) == chosen[row][1][0]
    return world


@dataclass(slots=True)
class Company:
    """How the rows of a world are computed, but for the order."""

    threads: int
    isa: str
    sizes: tuple[int, int]  # least and most rows of a pass
    slots: dict[int, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)


def same_as(isa: str, lib: Library) -> list[str]:
    """The instruction sets of ``lib`` that give the bits of ``isa``."""
    if isa == "portable" and not lib.binary.pipeinfer_portable_is_fused():
        return [isa]
    return [other for other in lib.available if other != "portable" or lib.binary.pipeinfer_portable_is_fused()]


def draw_company(dice: random.Random, world: World, sets: Sequence[str]) -> Company:
    sizes = dice.choice(((1, 1), (1, 4), (1, MOST_ROWS), (MOST_ROWS, MOST_ROWS), (2, 9), (100, 512)))
    company = Company(dice.choice((1, 1, 2, 2, 3)), dice.choice(sets), sizes)
    company.free = list(range(len(world.tokens) + 60))
    if dice.random() < 0.75:
        dice.shuffle(company.free)
    else:
        company.free.reverse()
    return company


def draw_passes(dice: random.Random, world: World, company: Company) -> Iterator[list[int]]:
    """The rows of each pass, none before its parent's pass; a row of -1 is a guess of nobody's."""
    ready = [row for row, parent in enumerate(world.parents) if parent < 0]
    children: dict[int, list[int]] = {}
    for row, parent in enumerate(world.parents):
        children.setdefault(parent, []).append(row)
    is_deep = dice.random() < 0.5
    while ready:
        rows: list[int] = []
        for _ in range(dice.randint(*company.sizes)):
            if not ready:
                break
            row = ready.pop(-1 if is_deep else dice.randrange(len(ready)))
            ready += children.get(row, [])
            rows.append(row)
        rows += [-1] * (dice.randint(0, 3) if company.sizes[1] > 1 and dice.random() < 0.3 else 0)
        dice.shuffle(rows)
        yield rows


def ranges_of(dice: random.Random, slots: Sequence[int]) -> np.ndarray[Any, Any]:
    """``slots`` as ranges of first slot and count, neighbours mostly joined."""
    ranges: list[list[int]] = []
    for slot in slots:
        if ranges and sum(ranges[-1]) == slot and dice.random() < 0.9:
            ranges[-1][1] += 1
        else:
            ranges.append([slot, 1])
    return np.array(ranges, np.int64).reshape(-1, 2)


def draw_batch(dice: random.Random, world: World, company: Company, rows: Sequence[int]) -> tuple[Batch, list[int]]:
    """The batch of a pass and the slots of guesses in it. Each row's list is cut anywhere between its sequence's
    canonical slots and its own."""
    slots = [company.free.pop() for _ in rows]
    company.slots |= {row: slot for row, slot in zip(rows, slots, strict=True) if row >= 0}
    paths, tokens = [], []
    for row, slot in zip(rows, slots, strict=True):
        known = [other for other in company.slots if other >= 0]
        before = dice.choice(known) if row < 0 and known else row
        path = [company.slots[other] for other in world.paths[before]] if before >= 0 else []
        paths.append(path if row >= 0 else [*path, slot])
        is_bad = row < 0 and world.weights.bad is not None and dice.random() < 0.7
        token = world.weights.bad if is_bad else dice.randrange(world.spec.vocab_size)
        tokens.append(world.tokens[row] if row >= 0 else token)
    sequences = [dice.choice(paths) for _ in range(dice.randint(1, 3))]
    sequence, prefix, own = [], [], []
    for path in paths:
        index = dice.randrange(len(sequences))
        shared = next((i for i, (a, b) in enumerate(zip(sequences[index], path, strict=False)) if a != b), None)
        shared = min(len(sequences[index]), len(path)) if shared is None else shared
        shared = min(shared, len(path) - 1)  # the row itself is the last of its ancestors
        sequence.append(index)
        prefix.append(dice.choice((0, shared, dice.randint(0, shared))))
        own.append(path[prefix[-1] :])
    canonical = tuple(ranges_of(dice, slots) for slots in sequences)
    numbers = [np.array(each, np.int64) for each in (tokens, [len(path) - 1 for path in paths], slots)]
    lists = [np.array(each, np.int64) for each in (sequence, prefix)]
    batch = Batch(*numbers, canonical, *lists, np.concatenate(own), np.cumsum([len(each) for each in own]))
    return batch, [slot for row, slot in zip(rows, slots, strict=True) if row < 0]


def check_case(world: World, shards: list[KernelShard], lib: Library, sets: Sequence[str], case: int) -> None:
    """Raises AssertionError for a row whose bits depend on its company."""
    dice = random.Random(f"case {case} of {world.seed}")
    company = draw_company(dice, world, sets)
    lib.set_threads(company.threads, dice.choice((0, 100)))
    lib.use(company.isa)
    forgotten(shards)
    for rows in draw_passes(dice, world, company):
        batch, guesses = draw_batch(dice, world, company, rows)
        here = f"{world}, case {case}: {company.threads} threads, {company.isa}, {len(rows)} rows"
        bad = [place for place, token in enumerate(batch.tokens.tolist()) if token == world.weights.bad]
        outs = push(shards, batch, bad)
        kept = [place for place, row in enumerate(rows) if row >= 0]
        names = [rows[place] for place in kept]
        for index, (found, truth) in enumerate(zip(outs, world.activations, strict=True)):
            assert torch.equal(found[kept], truth[names]), f"{here}: activations of shard {index}"
        asked = dice.sample(range(len(kept)), dice.randint(0, min(len(kept), MOST_ROWS + 5)))
        if asked:
            places, kind = [kept[each] for each in asked], dice.choice(KINDS)
            wanted = [names[each] for each in asked]
            logits, best = logits_of(shards[-1], outs[-1][places])
            assert torch.equal(logits, world.logits[wanted]), f"{here}: logits of {len(asked)} rows"
            positions = [len(world.paths[row]) for row in wanted]
            said = say(shards[-1], outs[-1], places, positions, kind)
            assert said == [world.said[row, kind] for row in wanted], f"{here}: {kind} of {len(asked)} rows"
            assert best == [world.said[row, "best"][0][0] for row in wanted], f"{here}: tokens beside their logits"
        for slot in guesses:
            company.free.insert(dice.randrange(len(company.free) + 1), slot)


def check_world(
    seed: int,
    cases: int,
    truth: Library | None = None,
    lib: Library | None = None,
    draw: Callable[[int], World] = draw_world,
) -> str:
    """Some cases of a world; ``truth``: the library that says what a row is alone, ``lib``: the one that computes it in
    company; the library in use, if nothing else is given. Returns a digest of the world's logits."""
    world = draw(seed)
    found = [each or library() for each in (truth, lib)]
    assert found[0] is not None and found[1] is not None, "there is no library of kernels"
    is_before = [(each.threads, each.isa) for each in found]
    isa = "portable" if seed % 10 == 9 and truth is None else found[0].available[0]
    shards = load(world, found[0])
    try:
        learn(world, shards, found[0], isa)
        if found[1] is not found[0]:
            shards = load(world, found[1])
        for case in range(cases):
            check_case(world, shards, found[1], same_as(isa, found[1]), case)
    finally:
        for each, (threads, isa) in zip(found, is_before, strict=True):
            each.set_threads(threads)
            each.use(isa)
    return hashlib.sha256(world.logits.numpy().tobytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    digest, done, world = hashlib.sha256(), 0, 0
    while done < options.cases:
        cases = min(CASES_PER_WORLD, options.cases - done)
        digest.update(check_world(options.seed * 1_000_000 + world, cases).encode())
        done, world = done + cases, world + 1
        if world % 25 == 0 or done == options.cases:
            print(f"{done} cases in {world} worlds: equal; digest of the logits {digest.hexdigest()[:16]}", flush=True)


if __name__ == "__main__":
    main()
