"""The order of sums in linear layers: where each is cut into the chains of which it consists.

A sum over the inputs is 8 chains of fused multiply-adds, each in order of the inputs, combined by a binary tree. The
cuts between the chains are the tensor's own, so that ranks which hold some of the chains can give the same sums."""

from __future__ import annotations

from stages.kernels.library import LEAVES, PANEL

BLOCK = 32
"""Inputs of a block of quantised weights, of which their sums consist: their cuts are multiples of it."""


def even_cuts(inputs: int, unit: int = 2) -> list[int]:
    """Cuts of ``inputs`` into 8 parts of about the same size, multiples of ``unit`` (even): 9 numbers."""
    units = -(-inputs // unit)
    return [min(inputs, unit * (units * leaf // LEAVES)) for leaf in range(LEAVES + 1)]


def default_cuts(inputs: int) -> list[int]:
    """Cuts of the sums over ``inputs`` where nothing else asks for others; between blocks where there are enough."""
    return even_cuts(inputs, BLOCK if inputs >= LEAVES * BLOCK else PANEL if inputs >= LEAVES * PANEL else 2)


def are_aligned(whole: list[int]) -> bool:
    """Whether the cuts ``whole`` lie between blocks, so that chains consist of whole ones."""
    return all(cut % BLOCK == 0 or cut == whole[-1] for cut in whole)


def part_of(whole: list[int], rank: int, size: int) -> tuple[range, list[int]]:
    """Which inputs rank ``rank`` of ``size`` has of those that ``whole`` cuts, and their own cuts: the chains of other
    ranks are empty."""
    mine = range(whole[LEAVES * rank // size], whole[LEAVES * (rank + 1) // size])
    return mine, [min(max(cut, mine.start), mine.stop) - mine.start for cut in whole]
