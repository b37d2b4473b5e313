"""Both ends of a model on the C kernels: the head, which chooses tokens, and the embedding of a group."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import addressof

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stages.checkpoint.checkpoint import EMBEDDING, HEAD, NORM, Weights
from stages.checkpoint.spec import ModelSpec
from stages.kernels.group import MOST_ROWS, Group
from stages.kernels.library import BEST_NBYTES, CHOSEN, HEAD_BLOCK, CHead, Library
from stages.kernels.linear import Linear, padded
from stages.models.split import token_ranges
from stages.quantization.matrix import Matrix, QuantizedMatrix, dense

Chosen = npt.NDArray[np.void]


def spread(lib: Library, group: Group, vocabulary: int, tokens: npt.NDArray[np.int64], x: Tensor) -> None:
    """Embedded rows from the ranks that have them to all: ``x``, float32 [tokens, hidden_size], has this rank's."""
    stops = [part.stop for part in token_ranges(vocabulary, group.size)]
    owners = np.searchsorted(stops, tokens, side="right").astype(np.int32)
    if group.is_fused:
        lib.kernels.spread(addressof(group.c), owners.ctypes.data, len(tokens), x.shape[1], x.data_ptr())
        group.check()
        group.exchanges["fused"] += 1
        return
    parts = torch.zeros((group.size, *x.shape))
    parts[group.rank] = x
    group.bring(parts.numpy())
    x.copy_(parts[torch.from_numpy(owners).long(), torch.arange(len(tokens))])


def choose(
    lib: Library, group: Group | None, head: CHead, vocabulary: int, limit: int, x: Tensor, with_logits: bool
) -> tuple[Chosen, Tensor | None]:
    """What ``head`` chooses after each row of ``x`` [rows, hidden_size], CHOSEN [rows], and the logits [rows, limit] if
    they are wanted. ``limit``: no token from here on. In a group the leader alone has them."""
    size, rank = (group.size, group.rank) if group else (1, 0)
    parts = token_ranges(vocabulary, size)
    limits = [max(0, min(limit, part.stop) - part.start) for part in parts]
    head.limit, head.first = limits[rank], parts[rank].start
    chosen = np.zeros(len(x), CHOSEN)
    logits = torch.empty((len(x), limit)) if with_logits else None
    blocks = [-(-count // HEAD_BLOCK) for count in limits]
    step = len(x) if group is None else min(MOST_ROWS, _rows_of_a_slot(group, blocks, limits, with_logits))
    positions, seeds, temperatures = head.positions, head.seeds, head.temperatures
    for start in range(0, len(x), step):
        some = x[start : start + step]
        if temperatures:
            head.positions, head.seeds = positions + 8 * start, seeds + 8 * start
            head.temperatures = temperatures + 4 * start
        found = logits[start : start + step] if logits is not None else None
        _choose(lib, group, head, some, blocks, limits, chosen[start : start + step], found)
    return chosen, logits


def _rows_of_a_slot(group: Group, blocks: Sequence[int], limits: Sequence[int], with_logits: bool) -> int:
    rows = group.slot_nbytes // (BEST_NBYTES * max(1, *blocks))
    return max(1, min(rows, group.slot_nbytes // (4 * max(1, *limits))) if with_logits else rows)


def _choose(
    lib: Library,
    group: Group | None,
    head: CHead,
    x: Tensor,
    blocks: Sequence[int],
    limits: Sequence[int],
    chosen: Chosen,
    logits: Tensor | None,
) -> None:
    count, kernels, rank = len(x), lib.kernels, group.rank if group else 0
    normed = torch.zeros((count, padded(x.shape[1])))
    rows = x.data_ptr(), count, normed.data_ptr()
    if group is None:
        best = np.empty((count, blocks[0] * BEST_NBYTES), np.uint8)
        wanted = None if logits is None else logits.data_ptr()
        kernels.head(addressof(head), *rows, best.ctypes.data, chosen.ctypes.data, wanted)
        return
    of_ranks, scratch = np.array(blocks, np.int32), np.empty(sum(blocks) * BEST_NBYTES, np.uint8)
    if group.is_fused:
        sizes = of_ranks.ctypes.data, np.array(limits, np.int32)
        wanted = None if logits is None else logits.data_ptr()
        out = scratch.ctypes.data, chosen.ctypes.data, wanted
        kernels.choose_in_group(addressof(head), addressof(group.c), *rows, sizes[0], sizes[1].ctypes.data, *out)
        group.check()
        group.exchanges["fused"] += 1
        return
    best = np.zeros((group.size, count * max(blocks) * BEST_NBYTES), np.uint8)
    found = torch.zeros((group.size, count * max(limits)))
    place = None if logits is None else found[rank].data_ptr()
    kernels.head(addressof(head), *rows, best[rank].ctypes.data, None, place)
    group.bring(best)
    if logits is not None:
        group.bring(found.numpy())
        parts = [part[: count * limit].view(count, limit) for part, limit in zip(found, limits, strict=True)]
        torch.cat(parts, 1, out=logits)
    places = (ctypes.c_void_p * group.size)(*[part.ctypes.data for part in best])
    of_all = of_ranks.ctypes.data, group.size, count, scratch.ctypes.data, chosen.ctypes.data
    kernels.choose_among(addressof(places), *of_all)


class EmbeddingRows:
    """The embedding ``name`` of ``weights``, whose rows are read from the file when they are needed, as ``dtype``."""

    def __init__(self, weights: Weights, name: str, dtype: torch.dtype) -> None:
        self._weights, self._name, self._dtype = weights, name, dtype

    def embed(self, tokens: Tensor) -> Tensor:
        """Float32 [tokens, hidden_size]. Raises CheckpointError."""
        needed, places = torch.unique(tokens, return_inverse=True)
        rows = [self._row(token) for token in needed.tolist()]
        return torch.cat(rows).float()[places]

    def _row(self, token: int) -> Tensor:
        part = {self._name: (slice(token, token + 1),)}
        return self._weights.read([self._name], self._dtype, part)[self._name]


Ends = dict[str, Tensor | Linear | EmbeddingRows]
"""What a shard has of EMBEDDING, NORM and HEAD."""


def read_ends(spec: ModelSpec, checkpoint: Weights, layers: range, dtype: torch.dtype) -> Ends:
    """The embedding for the first shard, norm and head for the last; a tied matrix that both need is packed once."""
    ends: Ends = {}
    stored = {end: checkpoint.stored_name(end) if spec.tied else end for end in (EMBEDDING, HEAD)}
    head = None
    is_shared = stored[EMBEDDING] == stored[HEAD]
    if layers.stop == spec.layer_count:
        head = checkpoint.matrices([stored[HEAD]], dtype)[stored[HEAD]]
        ends[NORM] = checkpoint.read([NORM], torch.float32)[NORM]
        ends[HEAD] = Linear.pack(head)
    if layers.start == 0:
        if is_shared and head is not None:
            return {**ends, EMBEDDING: ends[HEAD]}
        embedding = checkpoint.matrices([stored[EMBEDDING]], dtype)[stored[EMBEDDING]]
        if spec.tied and head is not None and _are_equal(embedding, head):
            ends[EMBEDDING] = ends[HEAD]
        else:
            ends[EMBEDDING] = embedding if isinstance(embedding, Tensor) else Linear.pack(embedding)
    return ends


def streamed_ends(
    spec: ModelSpec, checkpoint: Weights, layers: range, dtype: torch.dtype, is_direct: bool
) -> tuple[Ends, str | None]:
    """As ``read_ends``, without a head that can be read later; that tensor's name. ``is_direct``: embed by rows that
    are read when they are needed."""
    stored = {end: checkpoint.stored_name(end) if spec.tied else end for end in (EMBEDDING, HEAD)}
    is_first, is_last = layers.start == 0, layers.stop == spec.layer_count
    if is_first and not is_direct:
        return read_ends(spec, checkpoint, layers, dtype), None
    ends: Ends = {EMBEDDING: EmbeddingRows(checkpoint, stored[EMBEDDING], dtype)} if is_first else {}
    if not is_last:
        return ends, None
    return {**ends, NORM: checkpoint.read([NORM], torch.float32)[NORM]}, stored[HEAD]


def _are_equal(one: Matrix, other: Matrix) -> bool:
    if isinstance(one, QuantizedMatrix) and isinstance(other, QuantizedMatrix):
        return one.is_like(other) and all(_are_same(getattr(one, name), getattr(other, name)) for name in TABLES)
    return one.shape == other.shape and torch.equal(dense(one), dense(other))


def _are_same(one: object, other: object) -> bool:
    """Of tensors; numbers, and whether there are tensors, are those of matrices that are like each other."""
    return not (isinstance(one, Tensor) and isinstance(other, Tensor)) or torch.equal(one, other)


TABLES = ("scales", "codes", "zeros", "factors", "minima", "minimum_factors")
"""What a quantised matrix consists of."""
