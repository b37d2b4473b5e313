"""Costs: what a model takes on a hardware, in seconds and bytes.

A layer's time is that of its matrices, then that of its attention, then an overhead. Each of the first two is the
longer one of reading (weights; keys and values) and computing, as the roofline model has it (Williams et al. 2009);
where the hardware's own curve is known, that takes the roofline's place. A model that fits a cache is faster than this
says, and kernels are slower than a roofline: on the host of two-core-zen5 it promised a quarter to three quarters
of the time that passes took, the curves between three quarters and 1.3 times (`pipeinfer doctor --validate`).
"""

from __future__ import annotations

from pipeinfer.core.errors import refuse
from pipeinfer.costs.hardware import Arithmetic, Hardware
from pipeinfer.costs.shapes import Shape


class ModelCosts:
    """One model on ``hardware``. Raises UserError where the hardware says nothing of the model's dtype."""

    def __init__(self, hardware: Hardware, shape: Shape) -> None:
        known = hardware.arithmetic
        if shape.dtype not in known:
            refuse(
                f"hardware {hardware.name} says nothing of {shape.dtype}, in which {shape.name} computes",
                f"take a model that computes in {' or '.join(known)}, or add [{shape.dtype}.peak] to the description",
            )
        self.shape = shape
        self._bandwidth = hardware.bandwidth
        self._arithmetic: Arithmetic = known[shape.dtype]
        self._linear = self._arithmetic.linear if shape.stored_as_computed else None

    def layer_s(self, rows: int, context: int) -> float:
        """One layer for ``rows`` rows that look at ``context`` slots."""
        linears_s = self._linears_s(self.shape.layer_numel, rows)
        return linears_s + self._attention_s(rows, context) + self._arithmetic.overhead_s

    def head_s(self, rows: int) -> float:
        """The output head for ``rows`` rows; its overhead is taken to be a layer's."""
        return self._linears_s(self.shape.head_numel, rows) + self._arithmetic.overhead_s

    def pass_s(self, rows: int, context: int) -> float:
        """All layers and the output head."""
        return self.shape.layers * self.layer_s(rows, context) + self.head_s(rows)

    def _linears_s(self, numel: int, rows: int) -> float:
        nbytes = self.shape.nbytes(numel)
        if self._linear is not None:
            return self._linear.seconds(nbytes, rows)
        return max(nbytes / self._bandwidth, 2 * numel * rows / self._arithmetic.peak)

    def _attention_s(self, rows: int, context: int) -> float:
        shape = self.shape
        nbytes = context * shape.slot_nbytes
        if self._arithmetic.attention is not None:
            return self._arithmetic.attention.seconds(nbytes, rows * shape.heads // shape.kv_heads)
        flops = 4 * rows * context * shape.heads * shape.head_dim
        return max(nbytes / self._bandwidth, flops / self._arithmetic.peak)


class Costs:
    """A target and its draft, both on ``hardware``: what a pipeline of the target's layers takes."""

    def __init__(self, hardware: Hardware, target: Shape, draft: Shape | None = None) -> None:
        self.hardware = hardware
        self.target = ModelCosts(hardware, target)
        self.draft = None if draft is None else ModelCosts(hardware, draft)

    def layer_s(self, rows: int, context: int) -> float:
        """Seconds of one target layer for ``rows`` rows that look at ``context`` slots."""
        return self.target.layer_s(rows, context)

    def head_s(self, rows: int) -> float:
        """Seconds of the target's output head."""
        return self.target.head_s(rows)

    def draft_s(self, rows: int, context: int) -> float:
        """Seconds of a whole pass of the draft."""
        if self.draft is None:
            refuse("a draft pass without a draft", "name a draft model")
        return self.draft.pass_s(rows, context)

    def activation_nbytes(self, rows: int) -> int:
        """Bytes that go from one stage to the next."""
        return rows * self.target.shape.row_nbytes

    def slots_nbytes(self, layers: int, slots: int) -> int:
        """Bytes of ``slots`` slots of ``layers`` layers: a rank's keys and values, or a run's partition of them."""
        return round(layers * slots * self.target.shape.slot_nbytes)

    def stage_nbytes(self, layers: int, slots: int, ends: int = 0) -> int:
        """Bytes that a stage of ``layers`` layers and ``slots`` slots holds. ``ends``: how many matrices of the size of
        the output head it has beside them: 1 for the first stage (its embedding) and for the last."""
        shape = self.target.shape
        weights = layers * shape.layer_numel + ends * shape.head_numel
        return round(shape.nbytes(weights)) + self.slots_nbytes(layers, slots)
