"""Some consecutive layers of any decoder that transformers knows and that can be cut by its layers.

This shard is slower than KernelShard, whose layers are fused, but depends on no architecture: layers, rotary
embeddings, norms and heads are transformers' own code (generic_skeleton.py) on our slots (generic_slots.py) and, where
they are built, on our kernels (generic_kernels.py), so that a row has the same bits in any company. generic_spec.py
decides which models are served. The rule about finite numbers in slots is LlamaShard's.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.ports import Batch, Payload, SampledToken, SamplingInputs
from pipeinfer.core.slots import batch_in_order, visible_slots
from stages.kernels.finite import all_may_stand, tamed
from stages.kernels.library import library
from stages.kernels.linear import padded
from stages.kernels.top_tokens import top_tokens
from stages.models.generic_kernels import Weight, log_totals, use_kernels
from stages.models.generic_skeleton import Skeleton
from stages.models.generic_slots import LayerSlots, SlotCache, UnsupportedError, View, looking
from stages.models.generic_spec import GenericSpec


class GenericShard:
    """Layers ``layers`` of a model: a ShardModel. The first shard embeds, the last one chooses tokens."""

    def __init__(
        self,
        spec: GenericSpec,
        skeleton: Skeleton,
        layers: range,
        kv: list[LayerSlots],
        vocabulary: int | None = None,
        weights: Sequence[Weight] = (),
    ) -> None:
        """``kv``: one for each layer of the model, those of other shards empty. ``weights``: what the kernels multiply
        by. Use ``load``."""
        self.faults: dict[int, int] = {}
        self._spec, self._skeleton, self._range, self._kv = spec, skeleton, layers, kv
        self._vocabulary = vocabulary
        own = kv[layers.start].keys
        assert own is not None
        self._dtype, self._device = own.dtype, own.device
        self._positions = torch.zeros(own.shape[2], dtype=torch.int64, device=own.device)  # of what each slot holds
        modules = [skeleton.model, *(skeleton.layers[index] for index in layers)]
        self._packed = weights
        self._weights = [tensor for module in modules for tensor in module.state_dict(keep_vars=True).values()]

    @classmethod
    def load(
        cls,
        spec: GenericSpec,
        layers: range,
        dtype: torch.dtype,
        capacity: int,
        device: str = "cpu",
        vocabulary: int | None = None,
    ) -> GenericShard:
        """Read the shard's weights, and no others, and set up ``capacity`` zeroed slots. Raises CheckpointError.
        ``vocabulary``: see LlamaShard.load."""
        has_kernels = library() is not None and device == "cpu"
        skeleton = spec.skeleton(layers, dtype, has_kernels)
        skeleton.to(device, layers)
        weights: list[Weight] = []
        kv = []
        with torch.inference_mode():
            if has_kernels:
                modules = [skeleton.model, *(skeleton.layers[index] for index in layers)]
                weights = use_kernels(modules, skeleton.matrix)
                dtype = torch.float32
            for index, (heads, *sizes) in enumerate(spec.kv_shapes):
                if index not in layers:
                    kv.append(LayerSlots())
                    continue
                states = [torch.zeros((1, heads, capacity, padded(size)), dtype=dtype, device=device) for size in sizes]
                kv.append(LayerSlots(*(each[..., :size] for each, size in zip(states, sizes, strict=True))))
            shard = cls(spec, skeleton, layers, kv, vocabulary, weights)
            if weights:
                shard._pack()
            return shard

    def _pack(self) -> None:
        """Run one row, so that all weights are packed."""
        x = torch.zeros((1, self._spec.hidden_size))
        batch = batch_in_order([0])
        for after in self._layers(batch, None if self._range.start == 0 else x, self._view(batch)):
            x = after[0]
        if self._range.stop == self._spec.layer_count:
            self._skeleton.leave(x)
        for states in self._states():
            states.zero_()

    @property
    def weight_nbytes(self) -> int:
        """Bytes of weights that this shard holds resident; a tied embedding held once counts once."""
        others = {tensor.data_ptr(): tensor.nbytes for tensor in self._weights}
        total: int = sum(others.values()) + sum(weight.nbytes for weight in self._packed)
        return total

    @torch.inference_mode()
    def clear(self, slots: int) -> None:
        """Make the first ``slots`` slots as they were before any pass."""
        for states in self._states():
            states[:, :, :slots] = 0

    @torch.inference_mode()
    def forward(self, batch: Batch, hidden: Payload | None) -> Generator[float, None, Payload]:
        """Run the layers on ``batch``; ``hidden`` [rows, hidden_size] is None for the shard that embeds and is left as
        it is. Yields 0.0 after each layer; returns [rows, hidden_size]."""
        if (hidden is None) != (self._range.start == 0):
            raise LocalProtocolError("only the first shard can embed")
        self.faults = {}
        view = self._view(batch)
        x = torch.empty(0)
        try:
            for after in self._layers(batch, hidden, view):
                x = after
                yield 0.0
        except GeneratorExit:  # the pass is aborted
            for states in self._states():
                states.index_copy_(2, view.slots, tamed(states.index_select(2, view.slots)))
            raise
        # As in LlamaShard.
        written = [states.index_select(2, view.slots).abs().amax() for states in self._states()]
        if not (all_may_stand(torch.stack(written)) and x.sum().isfinite()):
            x = self._mend(batch, hidden, view)
        return x[0]

    def _layers(self, batch: Batch, hidden: Payload | None, view: View) -> Iterator[Tensor]:
        """The activations [1, rows, hidden_size] after each layer."""
        cache = SlotCache(self._kv, view)
        tokens = torch.from_numpy(batch.tokens).to(self._device)
        if self._vocabulary is not None:
            tokens = tokens.clamp_max(self._spec.vocab_size - 1)
        entered, calls = self._skeleton.enter(tokens, view, cache)
        x = entered if hidden is None else torch.as_tensor(hidden, dtype=self._dtype, device=self._device)[None]
        if view.bad is not None:
            view.bad.logical_or_(~x[0].isfinite().all(-1))
        for index in self._range:
            with looking(view):
                x = calls[index].run(self._skeleton.layers[index], x)
            # A layer that keeps other state than its own keys and values, or none, would change the tokens.
            if cache.written != [index]:
                raise UnsupportedError(f"layer {index}, which writes the slots of layers {cache.written}")
            cache.written.clear()
            yield x

    def _mend(self, batch: Batch, hidden: Payload | None, view: View) -> Tensor:
        """The pass once more: whatever is not finite is not written, its rows are noted in ``faults``, and zeros are
        passed on for them."""
        bad = torch.zeros(len(batch.tokens), dtype=torch.bool, device=self._device)
        view = replace(view, bad=bad, masks=[], seen={})
        x = torch.empty(0)
        for index, after in zip(self._range, self._layers(batch, hidden, view), strict=True):
            x = after
            bad |= ~x[0].isfinite().all(-1)
            for row in bad.nonzero()[:, 0].tolist():
                self.faults.setdefault(row, index)
        return x.masked_fill(bad[None, :, None], 0.0)

    def _states(self) -> Iterator[Tensor]:
        """Keys and values [1, kv heads, capacity, size] of all layers here."""
        for index in self._range:
            kv = self._kv[index]
            if kv.keys is not None and kv.values is not None:
                yield from (kv.keys, kv.values)

    def _view(self, batch: Batch) -> View:
        arrays = (batch.slots, batch.positions, visible_slots(batch))
        slots, positions, visible = (torch.from_numpy(array).to(self._device) for array in arrays)
        self._positions[slots] = positions
        return View(slots, positions, self._positions[: visible.shape[1]], visible)

    @torch.inference_mode()
    def sample(
        self, hidden: Payload, rows: Sequence[int], count: int, draw: SamplingInputs | None = None
    ) -> list[list[SampledToken]]:
        """See ShardModel; ``hidden``: [*, hidden_size]. Of equal tokens the lowest, as argmax has it."""
        if self._range.stop != self._spec.layer_count:
            raise LocalProtocolError("only the last shard can choose")
        if not rows:
            return []  # some models cannot be run without a row
        wanted = torch.as_tensor(hidden, dtype=self._dtype, device=self._device)[list(rows)]
        logits = self._skeleton.leave(wanted).float()[:, : self._vocabulary]
        choices = top_tokens(logits, count, draw, log_totals(logits))
        for row in [row for row, found in zip(rows, choices, strict=True) if not found]:
            self.faults.setdefault(row, self._spec.layer_count)
        return choices
