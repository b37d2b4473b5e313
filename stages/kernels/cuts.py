"""The order of sums in linear layers: where each is cut into the chains of which it consists.

A sum over the inputs is 8 chains of fused multiply-adds, each in order of the inputs, combined by a binary tree. The
cuts between the chains are the tensor's own, so that ranks which hold some of the chains can give the same sums."""

from __future__ import annotations

from stages.kernels.library import LEAVES, PANEL


def even_cuts(inputs: int, unit: int = 2) -> list[int]:
    """Cuts of ``inputs`` into 8 parts of about the same size, multiples of ``unit`` (even): 9 numbers."""
    units = -(-inputs // unit)
    return [min(inputs, unit * (units * leaf // LEAVES)) for leaf in range(LEAVES + 1)]


def default_cuts(inputs: int) -> list[int]:
    """Cuts of the sums over ``inputs`` where nothing else asks for others."""
    return even_cuts(inputs, PANEL if inputs >= LEAVES * PANEL else 2)


def part_of(whole: list[int], rank: int, size: int) -> tuple[range, list[int]]:
    """Which inputs rank ``rank`` of ``size`` has of those that ``whole`` cuts, and their own cuts: the chains of other
    ranks are empty."""
    mine = range(whole[LEAVES * rank // size], whole[LEAVES * (rank + 1) // size])
    return mine, [min(max(cut, mine.start), mine.stop) - mine.start for cut in whole]
