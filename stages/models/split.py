"""How the layers of a model are split among the ranks of a group, so that they compute what one rank alone computes.

A linear layer is split by columns where its outputs are (queries, keys and values by heads; gate and up), and by rows
where its inputs are (output, down), at the cuts of its sums' 8 chains (stages/kernels/cuts.py): rank r of N has the
chains from 8 r / N to 8 (r + 1) / N. With 1, 2, 4 or 8 ranks each has whole subtrees of a sum, and the bits are the
same for all of these; with other numbers they are another sum's. Embedding and head are split by tokens, in whole
blocks of the head's kernel. Where ranks are more than key and value heads, several hold the same head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeinfer.core.errors import UserError, refuse
from stages.checkpoint.checkpoint import EMBEDDING, HEAD, Weights
from stages.checkpoint.spec import ModelSpec
from stages.kernels.cuts import BLOCK, default_cuts, even_cuts, part_of
from stages.kernels.library import HEAD_BLOCK, LEAVES

if TYPE_CHECKING:
    import torch

    from stages.checkpoint.extents import Extent
    from stages.quantization.matrix import Matrix

Slices = tuple[slice, ...]


def output_cuts(spec: ModelSpec) -> list[int]:
    """Cuts of the sums over attention's outputs: between heads where there are enough, and between blocks of quantised
    weights too where there are enough of both."""
    heads, size = spec.head_count, spec.head_dim
    both = math.lcm(size, BLOCK)
    if heads * size >= LEAVES * both:
        return even_cuts(heads * size, both)
    if heads < LEAVES:
        return default_cuts(heads * size)
    return [size * (heads * leaf // LEAVES) for leaf in range(LEAVES + 1)]


def down_cuts(spec: ModelSpec) -> list[int]:
    """Cuts of the sums over the MLP's inner activations."""
    return default_cuts(spec.intermediate_size)


def token_ranges(vocabulary: int, size: int) -> list[range]:
    """The tokens of each rank's part of embedding and head."""
    blocks = -(-vocabulary // HEAD_BLOCK)
    cuts = [min(vocabulary, HEAD_BLOCK * (blocks * rank // size)) for rank in range(size + 1)]
    return [range(cuts[rank], cuts[rank + 1]) for rank in range(size)]


@dataclass(frozen=True, slots=True)
class Split:
    """The part of rank ``rank`` of ``size`` of a model like ``spec``."""

    spec: ModelSpec
    rank: int = 0
    size: int = 1

    @property
    def heads(self) -> range:
        """Heads of queries. Raises UserError if a rank would have none or a part of one."""
        inputs, size = part_of(output_cuts(self.spec), self.rank, self.size)[0], self.spec.head_dim
        if not inputs or inputs.start % size or inputs.stop % size:
            self._refuse(f"{self.spec.head_count} heads")
        return range(inputs.start // size, inputs.stop // size)

    @property
    def kv_heads(self) -> range:
        """Heads of keys and values that those queries need. Raises UserError where they share them unevenly."""
        heads, shared = self.heads, self.spec.head_count // self.spec.kv_head_count
        found = range(heads.start // shared, -(-heads.stop // shared))
        if len(found) > 1 and (heads.start % shared or heads.stop % shared):
            self._refuse(f"{self.spec.kv_head_count} key and value heads")
        return found

    @property
    def inner(self) -> range:
        """Inner activations of the MLP; of experts, which are spread whole, all. Raises UserError if a rank would have
        none."""
        if self.spec.experts is not None:
            return range(self.spec.intermediate_size)
        found = part_of(down_cuts(self.spec), self.rank, self.size)[0]
        if not found:
            self._refuse(f"{self.spec.intermediate_size} inner activations")
        return found

    def _refuse(self, what: str) -> None:
        refuse(f"--tp {self.size}: {what} cannot be split among {self.size} ranks", "use a divisor of the heads")

    @property
    def tokens(self) -> range:
        """Tokens of the embedding and the head."""
        return token_ranges(self.spec.vocab_size, self.size)[self.rank]

    @property
    def local(self) -> ModelSpec:
        """A model with as many heads and inner activations as this part."""
        heads, kv_heads, inner = len(self.heads), len(self.kv_heads), len(self.inner)
        return replace(self.spec, head_count=heads, kv_head_count=kv_heads, intermediate_size=inner)

    def slices(self, name: str) -> Slices:
        """What of the tensor ``name`` this part has."""
        if name in (EMBEDDING, HEAD):
            return (_slice(self.tokens),)
        spec, (kind, what) = self.spec, name.rsplit(".", 2)[1:]
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads, "v_proj": self.kv_heads, "o_proj": self.heads}
        if ".self_attn." in name and kind in heads:
            part, is_output = _slice(heads[kind], spec.head_dim), kind == "o_proj"
        elif spec.experts is None and kind in ("gate_proj", "up_proj", "down_proj"):
            part, is_output = _slice(self.inner), kind == "down_proj"
        else:  # norms, and experts, which are spread whole
            return (slice(None),)
        if not is_output:
            return (part,)
        return (slice(None), part) if what == "weight" else (slice(None),)  # a bias is added to the sum of all parts


def _slice(part: range, size: int = 1) -> slice:
    return slice(part.start * size, part.stop * size)


class SplitWeights(Weights):
    """The part of ``weights`` that ``split`` has; see Weights."""

    def __init__(self, weights: Weights, split: Split) -> None:
        self._weights, self._split = weights, split

    def stored_name(self, name: str) -> str:
        """See Weights."""
        return self._weights.stored_name(name)

    def read(
        self, names: Iterable[str], dtype: torch.dtype, slices: Mapping[str, Slices] | None = None
    ) -> dict[str, torch.Tensor]:
        """See Weights."""
        return self._weights.read(names := list(names), dtype, self._slices(names))

    def matrices(
        self, names: Iterable[str], dtype: torch.dtype, slices: Mapping[str, Slices] | None = None
    ) -> dict[str, Matrix]:
        """See Weights."""
        return self._weights.matrices(names := list(names), dtype, self._slices(names))

    def extents(self, names: Iterable[str], slices: Mapping[str, Slices] | None = None) -> list[Extent]:
        """See Weights."""
        return self._weights.extents(names := list(names), self._slices(names))

    def _slices(self, names: Iterable[str]) -> dict[str, Slices]:
        return {name: self._split.slices(name) for name in names}


def can_split(spec: ModelSpec, size: int) -> bool:
    """Whether ``size`` ranks can split a model like ``spec``."""
    try:
        refuse_unsplittable(spec, size)
    except UserError:
        return False
    return True


def refuse_unsplittable(spec: ModelSpec, size: int) -> None:
    """Raise UserError where ``size`` ranks cannot split a model like ``spec``."""
    for rank in range(size):
        _ = Split(spec, rank, size).local
