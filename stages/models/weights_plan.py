"""What of a shard is resident, streamed or read row by row within so many bytes; without torch, so that a job is
refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeinfer.core.errors import refuse
from stages.checkpoint.checkpoint import EMBEDDING, HEAD, Weights, dense_tensors
from stages.checkpoint.extents import Extent
from stages.models.linear_sizes import linear_shape, linears_of, packed_nbytes, weight_names
from stages.models.split import Split, SplitWeights
from stages.weights.memory import BLOCK, whole
from stages.weights.plan import Part, Plan, least_nbytes, make_plan

MEBI = 1 << 20
FEW = 15 / 16
"""What has less than this share of 16 bits a weight is quantised."""


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """``plan``: of the layers' matrices. ``is_direct``: whether the rows of the embedding are read from the file when
    they are needed."""

    plan: Plan
    is_direct: bool


def shard_plan(
    weights: Weights,
    split: Split,
    layers: range,
    itemsize: int,
    budget: int,
    sampled: Callable[[int, str], int] | None = None,
) -> ShardPlan:
    """The plan of a shard within ``budget`` bytes, for numbers of ``itemsize`` bytes. ``weights``: of the whole model.
    ``sampled``: the packed bytes of a layer's quantised linear layer; without it those that the files have are taken
    for them. Raises UserError, which says the least budget."""
    if split.spec.experts is not None:
        refuse("--weights-memory for a model with experts: these are always resident", "use more ranks")
    mine = SplitWeights(weights, split) if split.size > 1 else weights
    kinds = linears_of(split.spec)
    parts = [[_part(mine, split, layer, kind, itemsize, sampled) for kind in kinds] for layer in layers]
    fixed, rows = _ends(mine, split, layers, itemsize)
    if layers.start == 0 and split.size == 1 and _is_plain(mine, split):
        return ShardPlan(_planned(parts, fixed, budget), True)
    return ShardPlan(_planned(parts, fixed + rows, budget), False)


def _planned(parts: list[list[Part]], fixed: int, budget: int) -> Plan:
    plan = make_plan(parts, fixed, budget)
    if plan is None:
        least = -(-least_nbytes(parts, fixed) // MEBI)
        refuse(f"--weights-memory {budget} bytes are too few for a rank with {len(parts)} layers", f"give {least}M")
    return plan


def _part(
    weights: Weights, split: Split, layer: int, kind: str, itemsize: int, sampled: Callable[[int, str], int] | None
) -> Part:
    outputs, inputs = linear_shape(split, kind)
    stored = weights.extents(weight_names(layer, kind))
    nbytes, read = packed_nbytes(outputs, inputs, itemsize), _blocks(stored) or outputs * inputs * itemsize
    if stored and sum(extent.nbytes for extent in stored) < 2 * outputs * inputs * FEW:
        nbytes = read if sampled is None else sampled(layer, kind)
    return Part(nbytes, read)


def _blocks(extents: list[Extent]) -> int:
    """Bytes of all blocks in which ``extents`` lie."""
    return sum(whole(extent.start % BLOCK + extent.nbytes) for extent in extents)


def _ends(weights: Weights, split: Split, layers: range, itemsize: int) -> tuple[int, int]:
    """Bytes of norms, biases and output head; and of the embedding, where there is one that is not the head."""
    spec, tokens = split.spec, len(split.tokens)
    vectors = [shape[0] for layer in layers for shape in dense_tensors(spec, layer).values() if len(shape) == 1]
    fixed, rows = 4 * sum(vectors), 0
    if layers.stop == spec.layer_count:
        fixed += _end(weights, split, HEAD, packed_nbytes(tokens, spec.hidden_size, itemsize)) + 4 * spec.hidden_size
    if layers.start == 0:
        rows = _end(weights, split, EMBEDDING, tokens * spec.hidden_size * itemsize)
        if layers.stop == spec.layer_count and is_shared(weights, split):
            rows = 0
    return fixed, rows


def _end(weights: Weights, split: Split, name: str, nbytes: int) -> int:
    """Bytes of an end that has ``nbytes`` unless it is quantised; then those that its file has are taken for them."""
    stored = sum(extent.nbytes for extent in weights.extents([weights.stored_name(name) if split.spec.tied else name]))
    is_quantized = 0 < stored < 2 * len(split.tokens) * split.spec.hidden_size * FEW
    return stored if is_quantized else nbytes


def is_shared(weights: Weights, split: Split) -> bool:
    """Whether one stored tensor is both embedding and output head."""
    return split.spec.tied and weights.stored_name(EMBEDDING) == weights.stored_name(HEAD)


def _is_plain(weights: Weights, split: Split) -> bool:
    """Whether the embedding is stored as it is, and rows of it can be read."""
    spec = split.spec
    name = weights.stored_name(EMBEDDING) if spec.tied else EMBEDDING
    stored, numbers = weights.extents([name]), spec.vocab_size * spec.hidden_size
    return len(stored) == 1 and stored[0].nbytes in (2 * numbers, 4 * numbers)
