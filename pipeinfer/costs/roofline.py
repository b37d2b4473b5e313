"""The cost model: seconds and bytes of a model on a hardware, by the roofline model (Williams et al. 2009).

    layer(r, c)      = linears(r) + attention(r, c) + overhead
    linears(r)       = max(W / B, 2 N r / P)
    attention(r, c)  = max(c V / B, 4 r c H D / P)
    head(r)          = linears(r) of the output head + overhead
    pass(r, c)       = layers * layer(r, c) + head(r)
    streamed(r, c)   = max(pass(r, c), S / D)

    r         rows of the pass
    c         KV slots that each row attends to
    N, W      weights of the layer (or of the output head), as a number and in bytes
    V         bytes of one slot's keys and values in one layer
    H, D      attention heads, and the size of a head
    B         memory bandwidth, bytes/s
    P         peak arithmetic, FLOP/s
    overhead  seconds of a layer beside its arithmetic
    S, D      bytes of weights that are read from a disk in each pass (--weights-memory), and the disk's bytes/s

Where the hardware description has a measured curve (hardware.py), the curve takes the place of the maximum: W bytes
read by r rows, or c V bytes read by r H / (KV heads) rows. The curve of linears applies only to weights that are stored
in the dtype of the arithmetic; quantised weights have the curve of their format, if it was measured.

Accuracy (`pipeinfer doctor --validate`, the host of two-core-zen5): the roofline predicted a quarter to three quarters
of the measured times, the curves 0.75 to 1.3 times the measured times. A model that fits into a cache is faster than
predicted.
"""

from __future__ import annotations

from pipeinfer.core.errors import refuse
from pipeinfer.costs.hardware import Arithmetic, Hardware
from pipeinfer.costs.shapes import Shape


class ModelCosts:
    """One model on ``hardware``. Raises UserError if the description lacks the model's dtype."""

    def __init__(self, hardware: Hardware, shape: Shape) -> None:
        known = hardware.arithmetic
        if shape.dtype not in known:
            refuse(
                f"hardware {hardware.name} says nothing of {shape.dtype}, in which {shape.name} computes",
                f"take a model that computes in {' or '.join(known)}, or add [{shape.dtype}.peak] to the description",
            )
        self.shape = shape
        self._bandwidth, self._disk = hardware.bandwidth, hardware.disk
        self._arithmetic: Arithmetic = known[shape.dtype]
        self._linear = self._arithmetic.linear if shape.stored_as_computed else hardware.weights.get(shape.format)

    def layer_s(self, rows: int, context: int) -> float:
        """Seconds of one layer for ``rows`` rows that attend to ``context`` slots."""
        linears_s = self._linears_s(self.shape.layer_numel, rows)
        return linears_s + self._attention_s(rows, context) + self._arithmetic.overhead_s

    def head_s(self, rows: int) -> float:
        """Seconds of the output head for ``rows`` rows, with a layer's overhead."""
        return self._linears_s(self.shape.head_numel, rows) + self._arithmetic.overhead_s

    def pass_s(self, rows: int, context: int) -> float:
        """Seconds of all layers and the output head."""
        return self.shape.layers * self.layer_s(rows, context) + self.head_s(rows)

    def streamed_s(self, rows: int, context: int, nbytes: float) -> float:
        """Seconds of a pass that reads ``nbytes`` of weights from the disk meanwhile: nearly the same for few rows and
        many. Raises UserError if the description has no disk."""
        if self._disk is None:
            refuse("the hardware description says nothing of a disk", "add [disk.bandwidth] to it")
        return max(self.pass_s(rows, context), nbytes / self._disk)

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
    """A target and its draft, both on ``hardware``: seconds and bytes of a pipeline of the target's layers."""

    def __init__(self, hardware: Hardware, target: Shape, draft: Shape | None = None) -> None:
        self.hardware = hardware
        self.target = ModelCosts(hardware, target)
        self.draft = None if draft is None else ModelCosts(hardware, draft)

    def layer_s(self, rows: int, context: int) -> float:
        """Seconds of one target layer for ``rows`` rows that attend to ``context`` slots."""
        return self.target.layer_s(rows, context)

    def head_s(self, rows: int) -> float:
        """Seconds of the target's output head."""
        return self.target.head_s(rows)

    def draft_s(self, rows: int, context: int) -> float:
        """Seconds of a pass of the draft."""
        if self.draft is None:
            refuse("a draft pass without a draft", "name a draft model")
        return self.draft.pass_s(rows, context)

    def activation_nbytes(self, rows: int) -> int:
        """Bytes of the activations that a stage sends to the next."""
        return rows * self.target.shape.row_nbytes

    def slots_nbytes(self, layers: int, slots: int) -> int:
        """Bytes of the keys and values of ``slots`` slots in ``layers`` layers."""
        return round(layers * slots * self.target.shape.slot_nbytes)

    def stage_nbytes(self, layers: int, slots: int, ends: int = 0) -> int:
        """Bytes that a stage of ``layers`` layers and ``slots`` slots holds. ``ends``: further matrices of the size of
        the output head: 1 for the first stage (embedding), 1 for the last stage (output head)."""
        shape = self.target.shape
        weights = layers * shape.layer_numel + ends * shape.head_numel
        return round(shape.nbytes(weights)) + self.slots_nbytes(layers, slots)
