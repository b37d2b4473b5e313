"""Some consecutive layers of a Llama-family decoder, or of a Mixtral or Qwen3-MoE, on the C kernels
(stages/kernels/native).

A row has the same bits in any company: whatever rows are computed with it, in whichever slots, by any number of
threads and on any instruction set with fused multiply-add. Activations are float32 everywhere; weights, keys and values
are stored in the shard's dtype. A row reads the slots of its own list alone: nothing that another slot holds reaches
it."""

from __future__ import annotations

import ctypes
import functools
import math
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from ctypes import addressof
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeinfer.core.ports import GREEDY, Batch, Payload, SampledToken, Sampling, SamplingInputs
from pipeinfer.core.slots import slots_of
from stages.checkpoint.checkpoint import EMBEDDING, HEAD, NORM, Weights, dense_tensors
from stages.checkpoint.spec import ModelSpec
from stages.kernels.group import Group, tile_panels
from stages.kernels.library import (
    PANEL,
    PHASES,
    CHead,
    CLayer,
    CLinear,
    CModel,
    CRows,
    Library,
    library,
)
from stages.kernels.linear import FORMATS, Linear, padded
from stages.kernels.sampling import changes_nothing, processors
from stages.kernels.top_tokens import add_tops, top_tokens
from stages.models.bulk import compute_in_bulk
from stages.models.ends import Chosen, EmbeddingRows, Ends, choose, read_ends, spread, streamed_ends
from stages.models.experts import Experts
from stages.models.layer_linears import pack_linear
from stages.models.linear_sizes import LINEARS, linear_shape, linears_of, within_layer
from stages.models.packed_sizes import sampled_nbytes
from stages.models.rope import inverse_frequencies
from stages.models.split import Split, SplitWeights
from stages.models.streaming import LayerStream, Origin
from stages.models.weights_plan import ShardPlan, shard_plan
from stages.quantization.matrix import Matrix

POSITIONS = 256
"""As in native/attention.h: positions of a chunk of attention."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer: what the kernels are given, and the tensors that it points to."""

    c: CLayer
    linears: tuple[Linear, ...]
    tensors: tuple[Tensor, ...]


class _Scratch:
    """Memory of a pass of up to ``rows`` rows by ``threads`` threads."""

    def __init__(self, model: CModel, layers: Sequence[_Layer], rows: int, threads: int, ranks: int) -> None:
        self.rows, self.threads = rows, threads
        wide = max((max(padded(layer.c.qkv.columns), padded(layer.c.down.k)) for layer in layers), default=PANEL)
        queries = model.heads // model.kv_heads
        chunks = -(-model.capacity // POSITIONS)
        self.partial_size = chunks * queries * (2 + model.stride) + queries * model.stride
        self.normed = torch.zeros((rows, padded(model.hidden)))
        self.wide = torch.zeros((rows, wide))
        self.mixed = torch.zeros((rows, padded(model.heads * model.head_dim)))
        self.partial = torch.zeros(threads * self.partial_size)
        self.parts = torch.zeros(ranks * self.normed.numel())  # of every rank of a group


class KernelShard:
    """Layers ``layers`` of a model: a ShardModel. The first shard embeds, the last one chooses tokens."""

    def __init__(
        self,
        spec: ModelSpec,
        layers: list[_Layer],
        ends: Ends,
        filled_by: Experts | LayerStream | None,
        kv: Tensor,
        first_layer: int,
        vocabulary: int | None,
        group: Group | None,
    ) -> None:
        """``ends`` holds what the shard has of EMBEDDING, NORM and HEAD; ``filled_by``: the layers' experts, or
        what fills layers, and the head if it is not in ``ends``. Use ``load``."""
        lib = library()
        assert lib is not None
        self.faults: dict[int, int] = {}
        self._lib: Library = lib
        self._spec, self._layers, self._kv, self._first_layer = spec, layers, kv, first_layer
        self._experts = filled_by if isinstance(filled_by, Experts) else None
        self._stream = filled_by if isinstance(filled_by, LayerStream) else None
        self._embedding, self._norm, self._given_head = ends.get(EMBEDDING), ends.get(NORM), ends.get(HEAD)
        if self._stream is not None:
            weakref.finalize(self, self._stream.close)
        self._limit = spec.vocab_size if vocabulary is None else min(vocabulary, spec.vocab_size)
        frequencies, factor = inverse_frequencies(spec.rope, spec.head_dim, spec.context)
        capacity, stride = kv.shape[3:]
        self._rotations = torch.empty((capacity, spec.head_dim))
        frequencies = frequencies.contiguous()
        lib.binary.pipeinfer_rotations(
            frequencies.data_ptr(), spec.head_dim // 2, factor, capacity, self._rotations.data_ptr()
        )
        self._group = group
        self._split = Split(spec, group.rank, group.size) if group else Split(spec)
        local = self._split.local
        sizes = local.hidden_size, local.head_count, local.kv_head_count, local.head_dim
        rest = stride, local.intermediate_size, capacity, FORMATS[kv.dtype]
        self._c = CModel(*sizes, *rest, spec.norm_eps, spec.head_dim**-0.5, self._rotations.data_ptr())
        self._scratch = _Scratch(self._c, layers, 1, 1, self._split.size)

    @classmethod
    def load(
        cls,
        spec: ModelSpec,
        checkpoint: Weights,
        layers: range,
        dtype: torch.dtype,
        capacity: int,
        vocabulary: int | None = None,
        group: Group | None = None,
        memory: int = 0,
    ) -> KernelShard:
        """Read the shard's weights, layer by layer, and set up ``capacity`` zeroed slots. Raises CheckpointError.

        ``group``: the ranks that share the shard; this one has its part of every layer.
        ``vocabulary``: of a draft, how many tokens its target has rows for. It chooses none beyond those, and embeds
        tokens beyond its own rows as its last one. ``memory``: most bytes of resident weights and buffers, 0 for all
        weights. With it matrices are read while the shard computes; what fails then is raised by the pass."""
        with torch.inference_mode():
            split = Split(spec, group.rank, group.size) if group else Split(spec)
            shape = (len(layers), 2, len(split.kv_heads), capacity, padded(spec.head_dim))
            kv = torch.zeros(shape, dtype=dtype)
            more = vocabulary, group
            if memory:
                sampled = partial(sampled_nbytes, checkpoint, split, dtype=dtype)
                plan = shard_plan(checkpoint, split, layers, dtype.itemsize, memory, sampled)
                packed, ends, stream = _streamed(split, checkpoint, layers, dtype, kv, plan)
                return cls(spec, packed, ends, stream, kv, layers.start, *more)
            checkpoint = SplitWeights(checkpoint, split) if group else checkpoint
            packed = []
            for index, layer in enumerate(layers):
                names = dense_tensors(spec, layer)
                wide = _vectors(spec, layer)  # norms and biases stay float32
                read: dict[str, Matrix] = checkpoint.matrices(names.keys() - wide, dtype)
                read |= checkpoint.read(wide, torch.float32)
                packed.append(_pack(split, within_layer(read), kv[index]))
            ends = read_ends(spec, checkpoint, layers, dtype)
            experts = Experts.load(spec, checkpoint, layers, dtype, split.rank, split.size)
            return cls(spec, packed, ends, experts, kv, layers.start, *more)

    @property
    def weight_nbytes(self) -> int:
        """Bytes of weights that this shard holds resident, and of buffers for others; a tied embedding held once counts
        once."""
        if self._stream is not None:
            return self._stream.nbytes
        held = [tensor for layer in self._layers for tensor in layer.tensors]
        held += [tensor for layer in self._layers for linear in layer.linears for tensor in linear.held]
        held += self._experts.packed if self._experts is not None else []
        for end in (self._embedding, self._norm, self._head):
            held += end.held if isinstance(end, Linear) else [end] if isinstance(end, Tensor) else []
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in held}.values())

    @property
    def _head(self) -> Linear | None:
        """The output head of the last shard, waited for where it is still being read."""
        head = self._stream.head() if self._given_head is None and self._stream is not None else self._given_head
        assert head is None or isinstance(head, Linear)
        return head

    def _ready(self) -> Iterator[_Layer]:
        """The layers, each once its weights are there."""
        if self._stream is None:
            return iter(self._layers)
        return (self._layers[index] for index in self._stream.passes())

    @torch.inference_mode()
    def clear(self, slots: int) -> None:
        """Make the first ``slots`` slots what they were after loading."""
        self._kv[:, :, :, :slots].zero_()

    @torch.inference_mode()
    def forward(self, batch: Batch, hidden: Payload | None) -> Generator[float, None, Payload]:
        """Run the layers on ``batch``; ``hidden``, float32 [rows, hidden_size], is None for the shard that embeds and
        is left as it is. Yields 0.0 after each layer; returns float32 [rows, hidden_size]."""
        self.faults = {}
        count = len(batch.slots)
        x = self._enter(batch, hidden)
        if count > self._scratch.rows or self._lib.threads > self._scratch.threads:
            most = max(count, self._scratch.rows)
            self._scratch = _Scratch(self._c, self._layers, most, self._lib.threads, self._split.size)
        scratch, faults = self._scratch, np.zeros(count, np.int32)
        canonical = [slots_of(ranges) for ranges in batch.canonical]
        lists = (ctypes.c_void_p * len(canonical))(*[slots.ctypes.data for slots in canonical])
        given = batch.slots, batch.positions, batch.sequence, batch.prefix, batch.ancestors, batch.ancestor_ends
        arrays = [np.ascontiguousarray(array, np.int64) for array in given]  # which live until the pass has ended
        rows = CRows(
            count,
            *[array.ctypes.data for array in arrays],
            addressof(lists),
            *[tensor.data_ptr() for tensor in (x, scratch.normed, scratch.wide, scratch.mixed, scratch.partial)],
            scratch.partial_size,
            scratch.threads,
            faults.ctypes.data,
        )
        for index, layer in enumerate(self._ready(), self._first_layer):
            rows.layer, rows.first, rows.end = index, 0, PHASES
            self._compute(layer, rows)
            if self._experts is not None:
                self._experts.run(index - self._first_layer, addressof(self._c), rows, self._group)
            yield 0.0
        if faults.any():
            self.faults = {row: layer - 1 for row, layer in enumerate(faults.tolist()) if layer}
        return x

    def _compute(self, layer: _Layer, rows: CRows) -> None:
        """One layer; in a group with all its ranks, fused or in bulk."""
        group, given = self._group, (addressof(self._c), addressof(layer.c), addressof(rows))
        if group is None:
            self._lib.kernels.layer(*given)
            return
        rows.group = addressof(group.c)
        if group.is_fused:
            self._lib.kernels.layer(*given)
            group.exchanges["fused"] += 2
        else:
            scratch = self._scratch
            strides = scratch.wide.shape[1], scratch.mixed.shape[1]
            compute_in_bulk(self._lib, group, self._c, layer.c, rows, strides, scratch.parts)
        group.check()

    def _enter(self, batch: Batch, hidden: Payload | None) -> Tensor:
        """The first layer's input, float32 [rows, hidden_size], for the layers to write to."""
        if hidden is not None:
            return torch.as_tensor(hidden).to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        assert self._embedding is not None, "only the first shard can embed"
        tokens = torch.from_numpy(batch.tokens)
        if int(tokens.max()) >= self._spec.vocab_size:
            tokens = tokens.clamp_max(self._spec.vocab_size - 1)
        if self._group is None:
            return self._embed(tokens)
        x = torch.zeros((len(tokens), self._spec.hidden_size))
        first = self._split.tokens.start
        mine = (tokens >= first) & (tokens < self._split.tokens.stop)
        if mine.any():
            x[mine] = self._embed(tokens[mine] - first)
        spread(self._lib, self._group, self._spec.vocab_size, tokens.numpy(), x)
        return x

    def _embed(self, tokens: Tensor) -> Tensor:
        """Float32 [tokens, hidden_size]; ``tokens`` as rows of this shard's embedding."""
        if isinstance(self._embedding, EmbeddingRows):
            return self._embedding.embed(tokens)
        if isinstance(self._embedding, Tensor):
            return F.embedding(tokens, self._embedding).float()
        assert self._embedding is not None, "only the first shard can embed"
        x = torch.empty((len(tokens), self._spec.hidden_size))
        tokens = tokens.contiguous()
        self._lib.kernels.embed(addressof(self._embedding.c), tokens.data_ptr(), len(tokens), x.data_ptr())
        return x

    @torch.inference_mode()
    def sample(
        self, hidden: Payload, rows: Sequence[int], count: int, draw: SamplingInputs | None = None
    ) -> list[list[SampledToken]]:
        """See ShardModel; ``hidden``: [*, hidden_size]. Of equal tokens the lowest, as argmax has it."""
        assert isinstance(self._norm, Tensor) and isinstance(self._head, Linear), "only the last shard can choose"
        if not rows:
            return []
        chosen, logits = self.choose(hidden[list(rows)], draw, count)
        with np.errstate(invalid="ignore"):
            log_totals = chosen["highest"] + np.log(chosen["total"]).astype(np.float32)
        found = zip(chosen["token"].tolist(), (chosen["logit"] - log_totals).tolist(), strict=True)
        choices: list[list[SampledToken]] = [[choice] if math.isfinite(choice[1]) else [] for choice in found]
        if logits is not None:
            self._choose_by_logits(choices, logits, count, draw, torch.from_numpy(log_totals)[:, None])
        for row in [row for row, found in zip(rows, choices, strict=True) if not found]:
            self.faults.setdefault(row, self._spec.layer_count)
        return choices

    def _choose_by_logits(
        self,
        choices: list[list[SampledToken]],
        logits: Tensor,
        count: int,
        draw: SamplingInputs | None,
        log_totals: Tensor,
    ) -> None:
        """Complete ``choices``, which hold what the kernel chose after each row: by its logits where it needs them,
        else with the most probable tokens beside it."""
        if draw is None:
            choices[:] = top_tokens(logits, count, None, log_totals)
            return
        stored = _stored(len(choices), draw, count)
        if stored:
            some = logits if len(stored) == len(choices) else logits[stored]
            for row, found in zip(stored, top_tokens(some, count, draw.of(stored), log_totals[stored]), strict=True):
                choices[row] = found
        if not draw.is_guess:
            chosen = set(stored)
            add_tops(choices, [row for row in range(len(choices)) if row not in chosen], logits, draw, log_totals)

    @torch.inference_mode()
    def choose(self, x: Payload, draw: SamplingInputs | None, count: int) -> tuple[Chosen, Tensor | None]:
        """What ``draw`` draws after each row of ``x`` [rows, hidden_size] where the kernel draws by itself; the logits
        of all rows, where some need more. In a group all ranks do this, and the leader has the result."""
        assert isinstance(self._norm, Tensor) and isinstance(self._head, Linear)
        x = torch.as_tensor(x, dtype=torch.float32).contiguous()
        stored = _stored(len(x), draw, count)
        head = CHead(addressof(self._head.c), self._norm.data_ptr(), eps=self._spec.norm_eps)
        if draw is not None:
            temperatures = np.array([sampling.temperature for sampling in draw.samplings], np.float32)
            temperatures[stored] = 0
            seeds = np.array([sampling.seed for sampling in draw.samplings], np.uint64)
            positions = np.ascontiguousarray(draw.positions)  # all three live until the head has chosen
            if temperatures.any():
                head.positions, head.seeds = positions.ctypes.data, seeds.ctypes.data
                head.temperatures = temperatures.ctypes.data
        has_tops = draw is not None and not draw.is_guess and any(one.top_logprobs for one in draw.samplings)
        with_logits = bool(stored) or has_tops
        return choose(self._lib, self._group, head, self._spec.vocab_size, self._limit, x, with_logits)


def _stored(rows: int, draw: SamplingInputs | None, count: int) -> list[int]:
    """Of ``rows`` rows those whose tokens need logits, as the kernel cannot draw them by itself or they are given."""
    if count > 1:
        return list(range(rows))
    if draw is None:
        return []
    return [row for row, one in enumerate(draw.samplings) if draw.gives(row) or not _is_fused(one, draw.is_guess)]


@functools.lru_cache(1024)
def _is_fused(sampling: Sampling, is_guess: bool) -> bool:
    """Whether the kernel draws by itself: the highest logit, or by temperature alone."""
    if changes_nothing(sampling):
        return True
    return replace(processors(sampling), temperature=0.0) == GREEDY and not is_guess


def _pack(split: Split, read: Mapping[str, Any], kv: Tensor) -> _Layer:
    """The part that ``split`` has of one layer's tensors, by their names within the layer, as the kernels take them."""
    linears = [pack_linear(split, kind, read) for kind in linears_of(split.spec)]
    return _layer(split, read, [linear.c for linear in linears], linears, kv)


def _layer(
    split: Split, read: Mapping[str, Any], given: Sequence[CLinear], linears: Sequence[Linear], kv: Tensor
) -> _Layer:
    """A layer whose linear layers are ``given`` to the kernels. ``read``: its norms, among others."""
    spec = split.spec
    names = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    norms = [read[f"{name}.weight"].float() if f"{name}.weight" in read else None for name in names]
    addresses = [None if norm is None else norm.data_ptr() for norm in norms]
    given = [*given, *[CLinear()] * (4 - len(given))]
    c = CLayer(*addresses, *given, *[states.data_ptr() for states in kv])
    sizes = spec.head_count * spec.head_dim, spec.intermediate_size
    tiles = [tile_panels(spec.hidden_size, -(-size // split.size), kv.element_size()) for size in sizes]
    c.output_tile, c.down_tile = tiles
    held = [*norms, *[linear.bias for linear in linears]]
    return _Layer(c, tuple(linears), tuple(tensor for tensor in held if tensor is not None))


def _streamed(
    split: Split, weights: Weights, layers: range, dtype: torch.dtype, kv: Tensor, plan: ShardPlan
) -> tuple[list[_Layer], Ends, LayerStream]:
    """Layers that are filled later, the ends that are there already, and what fills the layers. The head comes after
    the layers; before them where it is also the embedding, and rows of that cannot be read one by one."""
    spec, lib = split.spec, library()
    assert lib is not None
    weights = SplitWeights(weights, split) if split.size > 1 else weights
    vectors = [within_layer(weights.read(_vectors(spec, layer), torch.float32)) for layer in layers]
    shapes = [CLinear(columns=columns, k=k) for columns, k in (linear_shape(split, kind) for kind in LINEARS)]
    packed = [_layer(split, read, shapes, [], states) for read, states in zip(vectors, kv, strict=True)]
    ends, head = streamed_ends(spec, weights, layers, dtype, plan.is_direct)
    origin = Origin(split, weights, layers, dtype, vectors, head)
    return packed, ends, LayerStream(lib, origin, plan.plan, [layer.c for layer in packed])


def _vectors(spec: ModelSpec, layer: int) -> list[str]:
    """The norms and biases of ``layer``."""
    return [name for name, shape in dense_tensors(spec, layer).items() if len(shape) == 1]
