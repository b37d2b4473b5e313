"""The layers of a shard whose weights are read while it computes: at first all of them, front to back, then in each
pass those that are not resident.

One thread packs what others read ahead (stages/weights), layer by layer, in the order of computation, and goes on with
the next pass's layers while this one's are computed. A pass waits for the layer that it needs, and for no other. So
the first pass computes while later layers load. A pass that is abandoned makes the next one begin at the first layer
again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.checkpoint.checkpoint import Weights
from stages.checkpoint.extents import Extent, reading_through
from stages.kernels.arena import Buffer, packing_into
from stages.kernels.library import CLayer, Library
from stages.kernels.linear import Linear
from stages.models.layer_linears import pack_linear
from stages.models.linear_sizes import LINEARS, weight_names, within_layer
from stages.models.split import Split
from stages.weights.plan import BUFFERS, Plan
from stages.weights.read_ahead import ReadAhead

KINDS = tuple(LINEARS)
READ_NBYTES = 64 << 20
"""Memory for reading ahead where everything becomes resident, given back afterwards."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a shard's matrices come from. ``vectors``: of each layer its biases, by their names within it; ``head``:
    the tensor that is the output head, for the last shard."""

    split: Split
    checkpoint: Weights
    layers: range
    dtype: torch.dtype
    vectors: Sequence[Mapping[str, Tensor]]
    head: str | None

    def names(self, index: int, kind: str) -> list[str]:
        """The matrices of the ``index``-th layer's linear layer ``kind``; behind the last layer comes the head."""
        if index == len(self.layers):
            return [self.head] if self.head is not None else []
        return weight_names(self.layers[index], kind)

    def extents(self, index: int, kind: str) -> list[Extent]:
        """Where they are."""
        return self.checkpoint.extents(self.names(index, kind))

    def pack(self, index: int, kind: str) -> Linear:
        """Read and pack them. Raises CheckpointError."""
        read: dict[str, Any] = self.checkpoint.matrices(self.names(index, kind), self.dtype)
        if index == len(self.layers):
            assert self.head is not None
            return Linear.pack(read[self.head])
        return pack_linear(self.split, kind, {**self.vectors[index], **within_layer(read)})


class _Outdated(Exception):
    """The layers that are being loaded are not the next ones any more."""


class LayerStream:
    """The layers ``cs`` of a shard, filled from ``origin`` as ``plan`` says. Threads run from the beginning on until
    ``close``, or until everything that is resident is there and nothing else is streamed."""

    def __init__(self, lib: Library, origin: Origin, plan: Plan, cs: Sequence[CLayer]) -> None:
        self._origin, self._plan, self._cs = origin, plan, cs
        self._streamed = [[k for k, flag in zip(KINDS, flags, strict=True) if flag] for flags in plan.streamed]
        self._changed = threading.Condition()
        count = BUFFERS if plan.is_streaming else 0
        self._buffers = [Buffer(lib, plan.buffer_nbytes) for _ in range(count)]
        self._free = deque(self._buffers)
        self._ready: deque[tuple[int, Buffer, dict[str, Linear]]] = deque()
        self._resident: dict[tuple[int, str], Linear] = {}
        self._held: tuple[int, Buffer, dict[str, Linear]] | None = None  # what is computed now
        self._turn, self._next = 0, 0  # how often the order has begun anew; the layer that a pass needs next
        self._error: BaseException | None = None
        self._is_over, self._is_complete = False, False
        self._ahead = ReadAhead(plan.read_nbytes or READ_NBYTES)
        self._thread = threading.Thread(target=self._load, name="pipeinfer weights", daemon=True)
        self._thread.start()

    @property
    def nbytes(self) -> int:
        """Bytes of resident weights and buffers once all is loaded, the ends and vectors of the shard included."""
        with self._changed:
            resident = sum(linear.nbytes for (_, kind), linear in self._resident.items() if kind in KINDS)
            extra = sum(buffer.extra for buffer in self._buffers)
        return self._plan.nbytes + max(0, resident - self._plan.resident) + extra

    @property
    def nbytes_read(self) -> int:
        """Bytes that were read from files so far."""
        return self._ahead.nbytes_read

    def passes(self) -> Iterator[int]:
        """The layers, each once it is there; it may be used until the next one is asked for. One pass at a time. Raises
        what reading raises."""
        with self._changed:
            if self._next and self._plan.is_streaming:
                self._turn += 1
                self._free.extend(buffer for _, buffer, _ in (*self._ready, *([self._held] if self._held else [])))
                self._ready.clear()
                self._held = None
                self._changed.notify_all()
            self._next = 0
        for index in range(len(self._cs)):
            self._await(index)
            yield index
        with self._changed:
            self._give_back()
            self._next = 0

    def head(self) -> Linear:
        """The output head, once it is there."""
        place = len(self._cs), "head"
        with self._changed:
            self._changed.wait_for(lambda: self._error or place in self._resident)
            self._raise()
            return self._resident[place]

    def wait(self) -> None:
        """Wait until all that is to be resident is there; not while anything is streamed, which passes have to use."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._is_complete)
            self._raise()

    def close(self) -> None:
        """End the threads, after what they have begun: none may be inside torch when the interpreter ends."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._ahead.close()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _give_back(self) -> None:
        if self._held is not None:
            self._free.append(self._held[1])
            self._held = None
            self._changed.notify_all()

    def _await(self, index: int) -> None:
        """Wait for layer ``index``, and let the kernels have it."""
        with self._changed:
            self._give_back()
            self._next = index + 1
            self._changed.wait_for(lambda: self._error or self._is_there(index))
            self._raise()
            if self._streamed[index]:
                self._held = self._ready.popleft()
                for kind, linear in self._held[2].items():
                    setattr(self._cs[index], kind, linear.c)

    def _is_there(self, index: int) -> bool:
        if any((index, kind) not in self._resident for kind in KINDS if kind not in self._streamed[index]):
            return False
        return not self._streamed[index] or bool(self._ready and self._ready[0][0] == index)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _load(self) -> None:
        """The life of the thread that packs."""
        try:
            while True:
                with self._changed:
                    turn, there = self._turn, frozenset(self._resident)
                self._ahead.begin(self._origin.extents(*place) for place in self._order(there))
                try:
                    self._load_in_order(turn, there)
                    break
                except _Outdated:
                    if self._is_over:
                        return
            self._ahead.close()
            with self._changed:
                self._is_complete = True
                self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                if not self._is_over:
                    self._error = error
                self._changed.notify_all()

    def _order(self, there: frozenset[tuple[int, str]]) -> Iterator[tuple[int, str]]:
        """What is to be loaded where ``there`` is: all that is missing, then for each pass what is streamed."""
        every = [(index, kind) for index in range(len(self._cs)) for kind in KINDS]
        every += [(len(self._cs), "head")] if self._origin.head is not None else []
        yield from (place for place in every if place not in there)
        again = [place for place in every if self._is_streamed(*place)]
        while again:
            yield from again

    def _is_streamed(self, index: int, kind: str) -> bool:
        return index < len(self._streamed) and kind in self._streamed[index]

    def _load_in_order(self, turn: int, there: frozenset[tuple[int, str]]) -> None:
        """Load for ever, or until all is there. Raises _Outdated where the order begins anew."""
        buffer: Buffer | None = None
        linears: dict[str, Linear] = {}
        try:
            for index, kind in self._order(there):
                is_streamed = self._is_streamed(index, kind)
                if is_streamed and buffer is None:
                    buffer = self._take(turn)
                with self._ahead.unit(), reading_through(self._ahead), packing_into(buffer if is_streamed else None):
                    linear = self._origin.pack(index, kind)
                with self._changed:
                    if self._turn != turn or self._is_over:
                        raise _Outdated
                    if not is_streamed:
                        self._keep(index, kind, linear)
                    else:
                        linears[kind] = linear
                        assert buffer is not None
                        if len(linears) == len(self._streamed[index]):
                            self._ready.append((index, buffer, linears))
                            buffer, linears = None, {}
                    self._changed.notify_all()
        finally:
            if buffer is not None:
                with self._changed:
                    self._free.append(buffer)

    def _keep(self, index: int, kind: str, linear: Linear) -> None:
        self._resident[index, kind] = linear
        if index < len(self._cs):
            setattr(self._cs[index], kind, linear.c)

    def _take(self, turn: int) -> Buffer:
        """A buffer that is free."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._turn != turn or self._is_over)
            if self._turn != turn or self._is_over:
                raise _Outdated
            buffer = self._free.popleft()
        buffer.empty()
        return buffer
