"""The emulated model: a chain of hashes kept in the slots, instead of a neural network.

Each layer writes a hash of its input and position into the row's slot and adds up the hashes of all visible slots. One
wrong commit, release, parent or mask therefore changes the tokens, and plain decoding is the oracle for protocol bugs,
without weights. A layer may also have a pace, so that schedules can be measured on machines without the hardware.
Reports must label such times as emulated.

The draft of an emulated pair knows the target's next token and hides it at a rank drawn from a given distribution: its
k-th choice is right with probability ``ranks[k]``, decided by the context alone.

What is sampled depends on every number that a real draw may depend on, and on nothing else: the sampling, the position
of the drawn token and, under a repetition penalty, the tokens seen. An error in one of these numbers changes the
tokens.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_right
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, chain, repeat

import numpy as np
import numpy.typing as npt

from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.ports import GREEDY, Batch, SampledToken, Sampling, SamplingInputs, ShardModel
from pipeinfer.core.slots import batch_in_order, visible_slots

Words = npt.NDArray[np.uint64]
DRAFT_RESTS = 16
"""A draft pass is computed in about so many parts, the draft's layers."""

SALTS = 1024
"""Samplings whose salts are kept."""

NEVER = 1e-9
"""The claimed probability of a choice without an entry in ``claims``."""

Pace = Callable[[int, int], float]
"""Seconds for so many rows, with so many slots in view."""


_SHIFT, _FIRST, _SECOND = np.uint64(33), np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)


def mix(words: Words) -> Words:
    """A good 64-bit mixer, element by element (the finaliser of MurmurHash3; Appleby, public domain)."""
    words = words ^ (words >> _SHIFT)
    words *= _FIRST
    words ^= words >> _SHIFT
    words *= _SECOND
    words ^= words >> _SHIFT
    return words


def spread(top1: float, choices: int = 8, decay: float = 0.6, cover: float = 0.97) -> tuple[float, ...]:
    """A rank distribution: ``top1``, then a geometric tail that brings the total up to ``cover``."""
    weights = [decay**index for index in range(choices - 1)]
    rest = max(0.0, cover - top1)
    return (top1, *(rest * weight / sum(weights) for weight in weights))


@dataclass(frozen=True, slots=True)
class EmulatedSpec:
    """An emulated target of ``layers`` layers and its draft; ``claims`` is what the draft believes of its own ranks.

    ``burst``: (tokens, share); in blocks of so many tokens this share of them have their rank in common, so that hits
    and misses come together; over all blocks each rank keeps its probability.

    ``faulty``, ``draft_faulty``: the share of rows whose numbers are said not to be finite, in the target and in its
    draft. Which ones, and in which layer, follows from the context."""

    layers: int = 8
    vocab: int = 1000
    seed: int = 0
    ranks: tuple[float, ...] = (0.8,)
    claims: tuple[float, ...] | None = None
    burst: tuple[int, float] = (1, 0.0)
    faulty: float = 0.0
    draft_faulty: float = 0.0


class EmulatedShard:
    """Layers ``layers`` of ``spec`` with ``capacity`` slots; ``layer_s`` is the pace of one layer. A draft rests for
    several layers at once: real ones have fewer."""

    def __init__(
        self,
        spec: EmulatedSpec,
        layers: range,
        capacity: int,
        layer_s: Pace = lambda rows, context: 0.0,
        is_draft: bool = False,
    ) -> None:
        self._spec = spec
        self._layers = layers
        self._layer_s = layer_s
        self._is_draft = is_draft
        self.faults: dict[int, int] = {}
        share = spec.draft_faulty if is_draft else spec.faulty
        self._fault_share = 1.0 - (1.0 - share) ** (1 / (spec.layers + 1))  # of one layer, or of the head
        self._kv = np.zeros((len(layers), capacity), dtype=np.uint64)
        self._totals = list(accumulate(spec.ranks))
        self._claims = [math.log(max(share, NEVER)) for share in spec.claims or spec.ranks]
        self._salts = mix(np.arange(layers.start, layers.stop, dtype=np.uint64) + np.uint64(spec.seed * 0x10001 + 1))

    @property
    def weight_nbytes(self) -> int:
        """An emulated model has no weights."""
        return 0

    def forward(self, batch: Batch, hidden: Words | None) -> Generator[float, None, Words]:
        """See ShardModel; ``hidden``: uint64 [rows]."""
        words, places, sees, pace = self._enter(batch, hidden)
        span = sees.shape[1]
        at_once = max(1, len(self._layers) // DRAFT_RESTS) if self._is_draft else 1
        for first in range(0, len(self._layers), at_once):
            layers = range(first, min(first + at_once, len(self._layers)))
            for index in layers:
                keys = self._kv[index]
                keys[batch.slots] = mix(words ^ self._salts[index] ^ places)
                words = mix(words + np.einsum("ij,j->i", sees, keys[:span]))
                self._note_faults(words, range(len(words)), self._layers[index])
            yield pace * len(layers)  # the hashes were made within it
        return words

    def _enter(self, batch: Batch, hidden: Words | None) -> tuple[Words, Words, Words, float]:
        """Begin a pass: the words of its rows and of their positions, uint64 [rows]; 1 for every slot that a row sees,
        uint64 [rows, span]; and the seconds of a layer."""
        if hidden is not None and len(hidden) != len(batch.tokens):
            raise LocalProtocolError(f"activations of {len(hidden)} rows for a pass of {len(batch.tokens)}")
        self.faults = {}
        pace = self._layer_s(len(batch.tokens), int(batch.positions[-1]) + 1)
        words = mix(batch.tokens.astype(np.uint64) + np.uint64(self._spec.seed)) if hidden is None else hidden
        places = mix(batch.positions.astype(np.uint64) + np.uint64(0x9E3779B9))
        return words, places, visible_slots(batch).astype(np.uint64), pace

    def sample(
        self, hidden: Words, rows: Sequence[int], count: int, draw: SamplingInputs | None = None
    ) -> list[list[SampledToken]]:
        """See ShardModel; log-probabilities of a draft are what it believes, with or without noise."""
        wanted = hidden[list(rows)]
        self._note_faults(wanted, rows, self._spec.layers)
        return self._choices(wanted if draw is None else stirred(wanted, draw), wanted, count, draw)

    def _choices(
        self, wanted: Words, words: Words, count: int, draw: SamplingInputs | None
    ) -> list[list[SampledToken]]:
        """``count`` tokens after each of the rows with ``words``, which stirred by ``draw`` are ``wanted``."""
        truths = self._truths(wanted)
        if not self._is_draft:
            choices: list[list[SampledToken]] = [[(truth, 0.0)] for truth in truths]
            if draw is not None and draw.given:
                self._take_given(choices, words, draw)
            if draw is not None and any(sampling.top_logprobs for sampling in draw.samplings):
                self._add_tops(choices, words, draw)
            return choices
        lots = _lot(wanted, 2)
        if draw is not None and self._spec.burst[1]:
            length, share = self._spec.burst
            blocks = (draw.positions // length).astype(np.uint64) + np.uint64(self._spec.seed << 32)
            lots = np.where(_lot(wanted, 3) < share, _lot(mix(blocks), 4), lots)
        return [self._guess(truth, lot, count) for truth, lot in zip(truths, lots.tolist(), strict=True)]

    def _truths(self, words: Words) -> list[int]:
        return (mix(words + np.uint64(1)) % np.uint64(self._spec.vocab)).tolist()  # type: ignore[no-any-return]

    def _take_given(self, choices: list[list[SampledToken]], words: Words, draw: SamplingInputs) -> None:
        """The tokens that ``draw`` gives, with log-probabilities that depend on all before them; see ShardModel."""
        for row, token in enumerate(draw.given):
            if draw.gives(row):
                word = words[row : row + 1] ^ mix(np.array([token + 1], np.uint64))
                choices[row] = [(token, -float(mix(word)[0] % np.uint64(4096)) / 256)]

    def _add_tops(self, choices: list[list[SampledToken]], words: Words, draw: SamplingInputs) -> None:
        """Behind the choice after each row come its most probable tokens, from the greedy one on; see ShardModel."""
        vocab = self._spec.vocab
        for found, first, sampling in zip(choices, self._truths(words), draw.samplings, strict=True):
            most = range(min(sampling.top_logprobs, vocab))
            found += [((first + index) % vocab, -1.0 - index) for index in most]

    def clear(self, slots: int) -> None:
        """Make the first ``slots`` slots as they were before any pass."""
        self._kv[:, :slots] = 0

    def _note_faults(self, words: Words, rows: Sequence[int], layer: int) -> None:
        if self._fault_share:
            lots = _lot(words ^ mix(np.full_like(words, layer)), 5 + self._is_draft).tolist()
            for row in [row for row, lot in zip(rows, lots, strict=True) if lot < self._fault_share]:
                self.faults.setdefault(row, layer)

    def _guess(self, truth: int, lot: float, count: int) -> list[SampledToken]:
        """``count`` tokens, the true one at the rank that ``lot`` in [0, 1) falls on, or nowhere."""
        vocab = self._spec.vocab
        tokens = [(truth + 1 + index) % vocab for index in range(count)]
        rank = bisect_right(self._totals, lot)
        if rank < min(count, len(self._totals)):
            tokens[rank] = truth
        return list(zip(tokens, chain(self._claims, repeat(math.log(NEVER))), strict=False))


def _lot(words: Words, salt: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each of ``words``."""
    lots: npt.NDArray[np.float64] = mix(words + np.uint64(salt)) / np.float64(2**64)
    return lots


def stirred(words: Words, draw: SamplingInputs) -> Words:
    """``words`` [rows], each changed by all that decides its row of ``draw``; by nothing if that is greedy."""
    drawn = np.array([sampling.temperature > 0 for sampling in draw.samplings])
    if drawn.any():
        salts = np.array([_salt(sampling) for sampling in draw.samplings], np.uint64)
        places = mix(draw.positions.astype(np.uint64) + np.uint64(0xA0761D65))
        words = np.where(drawn, mix(words ^ salts ^ places), words)
    penalised = [row for row, sampling in enumerate(draw.samplings) if sampling.repetition_penalty != 1]
    if penalised:
        seen = [_seen_word(draw.samplings[row].repetition_penalty, draw.seen[row]) for row in penalised]
        words = words.copy()
        words[penalised] = mix(words[penalised] ^ np.array(seen, np.uint64))
    changed = [row for row, one in enumerate(draw.samplings) if one.penalises_generated or one.logit_bias]
    if changed:
        generated = [_generated_word(draw.samplings[row], draw.generated, row) for row in changed]
        words = words.copy()
        words[changed] = mix(words[changed] ^ np.array(generated, np.uint64))
    return words


@lru_cache(SALTS)
def _salt(sampling: Sampling) -> np.uint64:
    """One word that depends on each number of ``sampling`` that a draw by temperature depends on; real ones in 32 bits
    each, as they travel."""
    reals = (sampling.temperature, sampling.top_p, sampling.min_p)
    return _folded(np.frombuffer(struct.pack("<QI3f", sampling.seed, sampling.top_k, *reals), np.uint64))


def _seen_word(penalty: float, tokens: npt.NDArray[np.int64]) -> np.uint64:
    """One word that depends on a repetition penalty and on which tokens it is for."""
    first = np.frombuffer(struct.pack("<f4x", penalty), np.uint64)
    return _folded(np.append(first, np.unique(tokens).astype(np.uint64)))


def _generated_word(sampling: Sampling, generated: Sequence[npt.NDArray[np.int64]], row: int) -> np.uint64:
    """One word that depends on the biases of ``sampling``, on its presence and frequency penalties, and on how often
    each token of ``row`` was generated, or only on whether it was where there is no frequency penalty."""
    reals = (sampling.presence_penalty, sampling.frequency_penalty, *[bias for _, bias in sampling.logit_bias])
    given = [np.array(reals, np.float32).view(np.uint32), [token for token, _ in sampling.logit_bias]]
    if sampling.penalises_generated:
        tokens, counts = np.unique(generated[row], return_counts=True)
        given += [tokens, counts if sampling.frequency_penalty else []]
    return _folded(np.concatenate([np.array(each, np.uint64) for each in given]))


def _folded(words: Words) -> np.uint64:
    """One word that depends on each of ``words`` and its place."""
    places = mix(np.arange(1, len(words) + 1, dtype=np.uint64))
    return np.uint64(mix(words ^ places).sum(dtype=np.uint64))


def per_layer(pass_s: Pace, layers: int) -> Pace:
    """The pace of one of ``layers`` layers that take ``pass_s`` together."""
    return lambda rows, context: pass_s(rows, context) / layers


class EmulatedPair:
    """An emulated target and its drafts, paced: seconds of one layer of the target and of one pass of a draft. The
    drafts differ in which tokens they hold likely: each has the ranks of the first, rotated by its index.

    ``make_stage``, ``make_draft``: make the shards, with the arguments of EmulatedShard; a group's are split among its
    ranks (see stages.models.emulated_group)."""

    def __init__(
        self,
        spec: EmulatedSpec,
        layer_s: Pace,
        draft_s: Pace,
        make_stage: Callable[..., ShardModel] = EmulatedShard,
        make_draft: Callable[..., ShardModel] = EmulatedShard,
    ) -> None:
        self._spec = spec
        self._layer_s = layer_s
        self._draft_s = draft_s
        self._make_stage, self._make_draft = make_stage, make_draft
        self.layers = spec.layers
        self.draft_contexts: tuple[int, ...] = ()

    def stage(self, layers: range, capacity: int) -> ShardModel:
        """See Pair."""
        return self._make_stage(self._spec, layers, capacity, self._layer_s)

    def draft(self, index: int, capacity: int) -> ShardModel:
        """See Pair."""
        layers, ranks = self._spec.layers, self._spec.ranks
        shift = index % len(ranks)
        spec = replace(self._spec, ranks=ranks[shift:] + ranks[:shift])
        return self._make_draft(spec, range(layers), capacity, per_layer(self._draft_s, layers), is_draft=True)

    def pack(self, hidden: Words) -> npt.NDArray[np.uint8]:
        """See Pair."""
        return hidden.view(np.uint8)

    def unpack(self, data: npt.NDArray[np.uint8], rows: int) -> Words:
        """See Pair."""
        return data.view(np.uint64)

    def blank(self, rows: int) -> Words:
        """See Pair."""
        return np.zeros(rows, np.uint64)


def plain_tokens(
    spec: EmulatedSpec,
    prompt: Sequence[int],
    count: int,
    stop_tokens: frozenset[int],
    sampling: Sampling = GREEDY,
) -> list[int]:
    """The emulated target's tokens after ``prompt``, computed one by one without tree, slot table or messages."""
    return plain_answer(spec, prompt, count, stop_tokens, sampling)[0]


def plain_answer(
    spec: EmulatedSpec,
    prompt: Sequence[int],
    count: int,
    stop_tokens: frozenset[int],
    sampling: Sampling = GREEDY,
) -> tuple[list[int], int | None]:
    """The same tokens, and the layer whose numbers are not finite if this ends the text."""
    emitted = list[int]()
    for token, _, fault in _plain(spec, prompt, count, sampling):
        if fault is not None:
            return emitted, fault
        emitted.append(token)
        if token in stop_tokens:
            break
    return emitted, None


def plain_scores(
    spec: EmulatedSpec, prompt: Sequence[int], tops: int
) -> tuple[list[list[SampledToken]], int | None]:
    """What the emulated target says of each token of ``prompt`` but the first: the token itself, then the ``tops`` most
    probable ones; and the layer whose numbers are not finite if this ends it."""
    shard, found = EmulatedShard(spec, range(spec.layers), len(prompt)), list[list[SampledToken]]()
    for position, token in enumerate(prompt[1:]):
        hidden = finish(shard.forward(batch_in_order(prompt[position : position + 1], position), None))
        draw = SamplingInputs((Sampling(top_logprobs=tops),), np.array([position + 1]), given=(token,))
        choices = shard.sample(hidden, (0,), 1, draw)
        if shard.faults:
            return found, shard.faults[0]
        found += choices
    return found, None


def right_choices(spec: EmulatedSpec, prompt: Sequence[int], count: int) -> list[int]:
    """Which of the draft's choices is the target's token, greedily, at each of ``count`` positions after ``prompt``; -1
    where none is."""
    draft = EmulatedShard(spec, range(0), 0, is_draft=True)
    found = list[int]()
    for index, (token, hidden, _) in enumerate(_plain(spec, prompt, count, GREEDY)):
        draw = SamplingInputs((GREEDY,), np.array([len(prompt) + index]))
        named = [choice for choice, _ in draft.sample(hidden, (0,), len(spec.ranks), draw)[0]]
        found.append(named.index(token) if token in named else -1)
    return found


def _plain(
    spec: EmulatedSpec, prompt: Sequence[int], count: int, sampling: Sampling
) -> Generator[tuple[int, Words, int | None], None, None]:
    """The target's next ``count`` tokens, each with the activations that it was chosen from; where they are not finite,
    any token with their layer, and no more."""
    shard = EmulatedShard(spec, range(spec.layers), len(prompt) + count)
    tokens = list(prompt)
    for position in range(len(prompt) + count - 1):
        hidden = finish(shard.forward(batch_in_order(tokens[position : position + 1], position), None))
        choices = list[list[SampledToken]]()
        if position >= len(prompt) - 1:
            given = (sampling,), np.array([position + 1]), (np.unique(tokens),)
            generated = (np.array(tokens[len(prompt) :], np.int64),)
            draw = None if sampling == GREEDY else SamplingInputs(*given, generated=generated)
            choices = shard.sample(hidden, (0,), 1, draw)
        if shard.faults:
            yield -1, hidden, shard.faults[0]
            return
        for (token, _), *_ in choices:
            tokens.append(token)
            yield token, hidden, None


def finish(passes: Generator[float, None, Words]) -> Words:
    """Run a forward pass to its end without resting."""
    while True:
        try:
            next(passes)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
