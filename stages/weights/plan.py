"""Which matrices of a shard are resident and which are streamed from its files in each pass.

    fixed + resident + 2 b + r <= budget

    fixed     bytes that are always resident: output head, embedding, norms
    resident  packed bytes of the resident matrices
    b         packed bytes of the streamed matrices of a layer, of the layer that has most: there are two buffers, one
              for the layer that is computed and one that is filled meanwhile
    r         bytes for what has been read and is not packed yet: at least the largest streamed matrix as it is stored

Every layer keeps about the same share of its bytes, so that each has something to compute while the next ones are read.
ZeRO-Inference (arXiv:2206.01861) streams whole layers; STI (ASPLOS'23) and DeepPlan (EuroSys'23) choose by layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

BUFFERS = 2
STEPS, PHASES = 128, 4
"""Shares of resident bytes that are tried, and where spreading them begins."""


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix of a layer: ``nbytes`` packed, ``stored`` bytes in its file, in whole blocks of it."""

    nbytes: int
    stored: int


@dataclass(frozen=True, slots=True)
class Plan:
    """``streamed``: of each layer, of each of its matrices, whether it is streamed. ``buffer_nbytes``: of each of the
    two buffers; ``read_nbytes``: for what is read and not packed yet. All 0 where everything is resident."""

    streamed: tuple[tuple[bool, ...], ...]
    fixed: int
    resident: int
    buffer_nbytes: int = 0
    read_nbytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of resident weights and buffers."""
        return self.fixed + self.resident + BUFFERS * self.buffer_nbytes + self.read_nbytes

    @property
    def is_streaming(self) -> bool:
        """Whether anything is streamed."""
        return any(any(layer) for layer in self.streamed)

    def stored(self, layers: Sequence[Sequence[Part]]) -> int:
        """Bytes of files that a pass reads. ``layers``: what the plan was made for."""
        return sum(
            part.stored
            for parts, flags in zip(layers, self.streamed, strict=True)
            for part, is_streamed in zip(parts, flags, strict=True)
            if is_streamed
        )


def least_nbytes(layers: Sequence[Sequence[Part]], fixed: int) -> int:
    """The least budget for ``layers``, each with its matrices: mostly that by which all of them are streamed."""
    plans = [*_plans(layers, fixed, False), resident(layers, fixed)]
    return min(plan.nbytes for plan in plans)


def resident(layers: Sequence[Sequence[Part]], fixed: int) -> Plan:
    """Everything in memory."""
    flags = tuple((False,) * len(parts) for parts in layers)
    return Plan(flags, fixed, sum(part.nbytes for parts in layers for part in parts))


def make_plan(layers: Sequence[Sequence[Part]], fixed: int, budget: int) -> Plan | None:
    """The plan that streams least of ``layers`` within ``budget`` bytes; what is left over is for reading ahead. None
    if the budget is too small."""
    everything = resident(layers, fixed)
    if everything.nbytes <= budget:
        return everything
    for is_ample in (True, False):  # a disk that waits for packing costs more than a resident matrix saves
        fitting = [plan for plan in _plans(layers, fixed, is_ample) if plan.nbytes <= budget]
        if fitting:
            best = max(fitting, key=lambda plan: plan.resident)
            return replace(best, read_nbytes=best.read_nbytes + budget - best.nbytes)
    return None


def _plans(layers: Sequence[Sequence[Part]], fixed: int, is_ample: bool) -> list[Plan]:
    """Plans that stream something, from more to less."""
    tried = [(step / STEPS, phase / PHASES) for step in range(STEPS) for phase in range(PHASES if step else 1)]
    plans = [_plan(layers, fixed, share, phase, is_ample) for share, phase in tried]
    return [plan for plan in plans if plan.is_streaming]


def _plan(layers: Sequence[Sequence[Part]], fixed: int, share: float, phase: float, is_ample: bool) -> Plan:
    """The plan that keeps about ``share`` of the bytes, spread by error diffusion that begins at ``phase`` (of a
    layer's share). ``is_ample``: whether a second matrix can be read while the largest one is packed."""
    flags, kept, widest, largest = list[tuple[bool, ...]](), 0, 0, 0
    owed = phase * share * sum(part.nbytes for part in layers[0])
    for parts in layers:
        streams, streamed_nbytes = list[bool](), 0
        for part in parts:
            owed += share * part.nbytes
            is_kept = owed >= part.nbytes / 2 and share > 0
            streams.append(not is_kept)
            if is_kept:
                owed -= part.nbytes
                kept += part.nbytes
            else:
                streamed_nbytes += part.nbytes
                largest = max(largest, part.stored)
        flags.append(tuple(streams))
        widest = max(widest, streamed_nbytes)
    return Plan(tuple(flags), fixed, kept, widest, largest * (2 if is_ample else 1))
