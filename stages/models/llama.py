"""Some consecutive layers of a Llama-family decoder in plain torch, with the key/value slots of those layers.

The weights are stored in another layout than in the checkpoint, without a change of the tokens. Linears that read the
same input are one matrix (q, k and v; gate and up). The rows of q and k are reordered within each head so that the two
numbers which rotary embedding rotates together lie side by side: the rotation is then one complex product in place, and
scores do not change because q and k are reordered alike. And keys and values of a layer share one tensor, so that one
call writes both.

A row never reads a slot that ``visible_slots`` hides: its weight in the softmax is exactly 0. But 0 times NaN is NaN,
so no slot may hold anything but finite numbers (see finite.py) when it is read: slots start at zero, and even a row
that sees nothing at all leaves a finite mean behind, because hidden scores are the lowest finite number and not minus
infinity. A pass is checked once, at its end. Where something is not finite the pass is computed again, with zeros in
its place, before another pass reads a slot, and the rows are named (``faults``); an aborted pass is cleared of
such numbers.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeinfer.core.ports import Batch, Payload, SampledToken, SamplingInputs
from pipeinfer.core.slots import visible_slots
from stages.checkpoint.checkpoint import EMBEDDING, HEAD, NORM, Weights, layer_tensors
from stages.checkpoint.spec import ModelSpec
from stages.kernels.finite import all_may_stand, may_stand, tamed
from stages.kernels.top_tokens import top_tokens
from stages.models.rope import cosines_sines, inverse_frequencies


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights, fused; a linear's weight is [out, in]."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    head_norm: Tensor | None  # [heads + kv heads, head_dim]: q's norm for the queries' heads, k's for the keys'
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None

    def tensors(self) -> list[Tensor]:
        found = [getattr(self, name) for name in self.__slots__]
        return [tensor for tensor in found if tensor is not None]


class _Pass(NamedTuple):
    """What all layers of one forward share."""

    rotations: Tensor  # complex64 [rows, 1, head_dim / 2]: multiplying rotates to the row's position
    slots: Tensor  # int64 [rows]
    mask: Tensor  # [1, 1, rows x heads per key head, span]: 0 where visible, else the lowest finite number
    bad: Tensor | None = None  # bool [rows]: where it is given, rows that are not finite are noted, and zeros written


class LlamaShard:
    """Layers ``layers`` of a model: a ShardModel. The first shard embeds, the last one chooses tokens."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: list[_Layer],
        ends: dict[str, Tensor],
        kv: Tensor,
        first_layer: int = 0,
        vocabulary: int | None = None,
    ) -> None:
        """``ends`` holds what the shard has of EMBEDDING, NORM, HEAD; ``slots``: zeros
        [layers, 2 * kv heads, capacity, head_dim], keys before values. Use ``load``."""
        self.faults: dict[int, int] = {}
        self._spec = spec
        self._layers = weights
        self._first_layer, self._vocabulary = first_layer, vocabulary
        self._all_kv = kv
        self._embedding, self._norm, self._head = ends.get(EMBEDDING), ends.get(NORM), ends.get(HEAD)
        self._kv = kv.unbind(0)
        self._keys, self._values = kv[:, None, : spec.kv_head_count], kv[:, None, spec.kv_head_count :]
        self._dtype, self._device = kv.dtype, kv.device
        frequencies, factor = inverse_frequencies(spec.rope, spec.head_dim, spec.context)
        rotations = torch.complex(*cosines_sines(torch.arange(kv.shape[2]), frequencies, factor))
        self._rotations = rotations[:, None].to(kv.device)  # complex64 [capacity, 1, head_dim / 2]: by position
        self._hidden_shape, self._head_shape = (spec.hidden_size,), (spec.head_dim,)
        self._eps = spec.norm_eps
        self._rotated = spec.head_count + spec.kv_head_count  # heads that carry a position: q's, then k's
        self._heads = self._rotated + spec.kv_head_count
        self._copies = spec.head_count // spec.kv_head_count  # rows of the mask for each row of the batch

    @classmethod
    def load(
        cls,
        spec: ModelSpec,
        checkpoint: Weights,
        layers: range,
        dtype: torch.dtype,
        capacity: int,
        device: str = "cpu",
        vocabulary: int | None = None,
    ) -> LlamaShard:
        """Read the shard's weights, layer by layer, and set up ``capacity`` zeroed slots. Raises CheckpointError.

        ``vocabulary``: of a draft, how many tokens its target has rows for. It chooses none beyond those, and embeds
        tokens beyond its own rows as its last one."""
        with torch.inference_mode():
            weights = []
            for layer in layers:
                read = checkpoint.read(layer_tensors(spec, layer), dtype)
                weights.append(_fuse(spec, {name.split(".", 3)[3]: tensor for name, tensor in read.items()}, device))
            ends = _read_ends(spec, checkpoint, layers, dtype, device)
            shape = (len(layers), 2 * spec.kv_head_count, capacity, spec.head_dim)
            return cls(spec, weights, ends, torch.zeros(shape, dtype=dtype, device=device), layers.start, vocabulary)

    @property
    def weight_nbytes(self) -> int:
        """Bytes of weights that this shard holds resident; a tied embedding held once counts once."""
        tensors = [tensor for layer in self._layers for tensor in layer.tensors()]
        tensors += [tensor for tensor in (self._embedding, self._norm, self._head) if tensor is not None]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    @torch.inference_mode()
    def clear(self, slots: int) -> None:
        """Make the first ``slots`` slots as they were before any pass."""
        self._all_kv[:, :, :slots] = 0

    @torch.inference_mode()
    def forward(self, batch: Batch, hidden: Payload | None) -> Generator[float, None, Payload]:
        """Run the layers on ``batch``; ``hidden`` [rows, hidden_size] is None for the shard that embeds and is left as
        it is. Yields 0.0 in the middle and at the end of each layer; returns [rows, hidden_size]."""
        self.faults = {}
        step = self._prepare(batch)
        span = step.mask.shape[-1]
        entered = x = self._enter(batch, hidden)
        try:
            for layer, kv in zip(self._layers, self._views(span), strict=True):
                x = x + self._attend(layer, kv, x, step)
                yield 0.0
                x = x + self._feed(layer, x)
                yield 0.0
        except GeneratorExit:  # the pass is aborted
            self._all_kv.index_copy_(2, step.slots, tamed(self._written(step.slots)))
            raise
        # One sum checks all activations. Finite ones may overflow in the sum; the second pass then finds no fault.
        if not (all_may_stand(self._written(step.slots)) and x.sum().isfinite()):
            x = self._mend(entered, step, span)
        return x

    def _enter(self, batch: Batch, hidden: Payload | None) -> Tensor:
        """The first layer's input [rows, hidden_size]."""
        if hidden is not None:
            return torch.as_tensor(hidden, dtype=self._dtype, device=self._device)
        assert self._embedding is not None, "only the first shard can embed"
        tokens = torch.from_numpy(batch.tokens).to(self._device)
        if self._vocabulary is not None:
            tokens = tokens.clamp_max(len(self._embedding) - 1)
        return F.embedding(tokens, self._embedding)

    def _written(self, slots: Tensor) -> Tensor:
        """A copy of the keys and values at ``slots`` of all layers: [layers, 2 * kv heads, rows, head_dim]."""
        return self._all_kv.index_select(2, slots)

    def _mend(self, x: Tensor, step: _Pass, span: int) -> Tensor:
        """The pass once more, from the first layer's input ``x`` on: whatever is not finite is not written, its rows
        are noted in ``faults``, and zeros are passed on for them."""
        bad = ~x.isfinite().all(-1)
        step = step._replace(bad=bad)
        for index, (layer, kv) in enumerate(zip(self._layers, self._views(span), strict=True), self._first_layer):
            x = x + self._attend(layer, kv, x, step)
            x = x + self._feed(layer, x)
            bad |= ~x.isfinite().all(-1)
            for row in bad.nonzero()[:, 0].tolist():
                self.faults.setdefault(row, index)
        return x.masked_fill(bad[:, None], 0.0)

    def _views(self, span: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each layer: all its slots, and the keys and the values [1, kv heads, span, head_dim] of the first ``span``
        ones. Cut for all layers at once, as each cut takes a microsecond."""
        keys, values = (half[:, :, :, :span].unbind(0) for half in (self._keys, self._values))
        return zip(self._kv, keys, values, strict=True)

    def _prepare(self, batch: Batch) -> _Pass:
        hidden_slots = torch.from_numpy(~visible_slots(batch)).to(self._device)
        mask = torch.zeros(hidden_slots.shape, dtype=self._dtype, device=self._device)
        mask.masked_fill_(hidden_slots, torch.finfo(self._dtype).min)
        mask = mask.repeat_interleave(self._copies, 0)
        if mask.shape[0] == 1 and self._dtype is torch.bfloat16:
            mask = mask.expand(2, -1)  # a single row of bf16 queries takes four times as long as two
        rotations = self._rotations[torch.from_numpy(batch.positions).to(self._device)]
        return _Pass(rotations, torch.from_numpy(batch.slots).to(self._device), mask[None, None])

    def _attend(self, layer: _Layer, kv: tuple[Tensor, Tensor, Tensor], x: Tensor, step: _Pass) -> Tensor:
        """The attention block's addition to ``x`` [rows, hidden_size]; writes the rows' keys and values. ``slots``: see
        _views."""
        rows, size = x.shape[0], self._spec.head_dim
        queries, kv_heads = self._spec.head_count, self._spec.kv_head_count
        own, keys, values = kv
        normed = F.rms_norm(x, self._hidden_shape, layer.attention_norm, self._eps)
        heads = F.linear(normed, layer.qkv, layer.qkv_bias).view(rows, self._heads, size)
        rotated = heads[:, : self._rotated]
        if layer.head_norm is not None:
            torch.mul(F.rms_norm(rotated, self._head_shape, None, self._eps), layer.head_norm, out=rotated)
        _rotate(rotated, step.rotations)
        written = heads[:, queries:]
        if step.bad is not None:
            step.bad.logical_or_(~may_stand(written).all(-1).all(-1))
            written = tamed(written)
        own.index_copy_(1, step.slots, written.transpose(0, 1))
        # The heads that share a key head stand as rows of one head: on CPUs that is faster than grouped attention, in
        # bf16 several times.
        packed = heads[:, :queries].view(rows, kv_heads, -1, size)
        if rows > 1:
            packed = packed.transpose(0, 1).reshape(1, kv_heads, -1, size)
        if packed.shape[2] < step.mask.shape[2]:
            packed = packed.expand(-1, -1, 2, -1)
        mixed = F.scaled_dot_product_attention(packed, keys, values, attn_mask=step.mask)
        if mixed.shape[2] > rows * self._copies:
            mixed = mixed[:, :, :1]
        if rows > 1:
            mixed = mixed.reshape(kv_heads, rows, -1).transpose(0, 1)
        return F.linear(mixed.reshape(rows, -1), layer.output, layer.output_bias)

    def _feed(self, layer: _Layer, x: Tensor) -> Tensor:
        """The feed-forward block's addition to ``x`` [rows, hidden_size]."""
        normed = F.rms_norm(x, self._hidden_shape, layer.mlp_norm, self._eps)
        gate, up = F.linear(normed, layer.gate_up, layer.gate_up_bias).chunk(2, -1)
        return F.linear(F.silu(gate) * up, layer.down, layer.down_bias)

    @torch.inference_mode()
    def sample(
        self, hidden: Payload, rows: Sequence[int], count: int, draw: SamplingInputs | None = None
    ) -> list[list[SampledToken]]:
        """See ShardModel; ``hidden``: [*, hidden_size]. Of equal tokens the lowest, as argmax has it."""
        assert self._norm is not None and self._head is not None, "only the last shard can choose"
        wanted = torch.as_tensor(hidden, dtype=self._dtype, device=self._device)[list(rows)]
        logits = F.linear(F.rms_norm(wanted, self._hidden_shape, self._norm, self._eps), self._head).float()
        choices = top_tokens(logits[:, : self._vocabulary], count, draw)
        for row in [row for row, found in zip(rows, choices, strict=True) if not found]:
            self.faults.setdefault(row, self._spec.layer_count)
        return choices


def _rotate(heads: Tensor, rotations: Tensor) -> None:
    """Rotate ``heads`` [rows, n, head_dim] in place, each pair of neighbours being one complex number."""
    if heads.dtype == torch.float32:
        heads.view(torch.complex64).mul_(rotations)
    else:  # there is no complex bfloat16
        heads.copy_((heads.float().view(torch.complex64) * rotations).view(torch.float32))


def _pair(tensor: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows within each head: i and i + head_dim / 2, which rotate together, become neighbours."""
    halves = tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _fuse(spec: ModelSpec, read: dict[str, Tensor], device: str) -> _Layer:
    """One layer's tensors, by their names within the layer, as they are used."""

    def joined(names: Sequence[str], kind: str) -> Tensor | None:
        if f"{names[0]}.{kind}" not in read:
            return None
        return torch.cat([read[f"{name}.{kind}"] for name in names]).to(device)

    for name in ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias", "q_norm.weight", "k_norm.weight"):
        if f"self_attn.{name}" in read:
            read[f"self_attn.{name}"] = _pair(read[f"self_attn.{name}"], spec.head_dim)
    head_norm = None
    if spec.qk_norm:
        counted = (("q", spec.head_count), ("k", spec.kv_head_count))
        norms = [read[f"self_attn.{letter}_norm.weight"].expand(count, -1) for letter, count in counted]
        head_norm = torch.cat(norms).to(device)
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_weight, gate_up_weight = joined(qkv, "weight"), joined(("mlp.gate_proj", "mlp.up_proj"), "weight")
    assert qkv_weight is not None and gate_up_weight is not None
    return _Layer(
        attention_norm=read["input_layernorm.weight"].to(device),
        qkv=qkv_weight,
        qkv_bias=joined(qkv, "bias"),
        head_norm=head_norm,
        output=read["self_attn.o_proj.weight"].to(device),
        output_bias=joined(["self_attn.o_proj"], "bias"),
        mlp_norm=read["post_attention_layernorm.weight"].to(device),
        gate_up=gate_up_weight,
        gate_up_bias=joined(("mlp.gate_proj", "mlp.up_proj"), "bias"),
        down=read["mlp.down_proj.weight"].to(device),
        down_bias=joined(["mlp.down_proj"], "bias"),
    )


def _read_ends(
    spec: ModelSpec, checkpoint: Weights, layers: range, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """The embedding for the first shard; norm and head for the last, the head being the embedding of a tied model."""
    sources = {EMBEDDING: EMBEDDING} if layers.start == 0 else {}
    if layers.stop == spec.layer_count:
        sources |= {NORM: NORM, HEAD: HEAD}
    if spec.tied:
        sources = {name: checkpoint.stored_name(source) for name, source in sources.items()}
    read = checkpoint.read(set(sources.values()), dtype)
    read = {name: tensor.to(device) for name, tensor in read.items()}
    ends = {name: read[source] for name, source in sources.items()}
    if spec.tied and EMBEDDING in ends and HEAD in ends and torch.equal(ends[EMBEDDING], ends[HEAD]):
        ends[HEAD] = ends[EMBEDDING]  # stored twice, held once
    return ends
