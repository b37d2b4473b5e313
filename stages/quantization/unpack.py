"""Codes of a few bits out of 32-bit words, the lowest bits of a word first."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.quantization.bit_fields import codes_of


def unpacked(packed: Tensor, bits: int, is_stream: bool = False) -> Tensor:
    """The codes in ``packed``, int32 [rows, words]: uint8 [rows, codes]. Where ``bits`` do not divide 32, a word has
    whole codes, and its highest bits are unused; with ``is_stream`` codes follow one another across words."""
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        data = packed.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # also of one word in each row
        return codes_of(data, bits, 8 // bits * data.shape[-1])
    if not is_stream:
        parts = [((packed >> (bits * place)) & mask).byte() for place in range(32 // bits)]
        return torch.stack(parts, -1).flatten(-2)
    wide = (packed.contiguous().long() & 0xFFFFFFFF).view(len(packed), -1, bits)
    codes = []
    for place in range(32):
        word, shift = divmod(bits * place, 32)
        code = wide[..., word] >> shift
        if shift + bits > 32:
            code = code | wide[..., word + 1] << (32 - shift)
        codes.append((code & mask).byte())
    return torch.stack(codes, -1).flatten(-2)


def one_or_each(zeros: Tensor, is_symmetric: bool, bits: int) -> int | Tensor | None:
    """``zeros``, uint8, as a QuantizedMatrix has them: of a symmetric matrix the one number that all must be, and None
    where they are not."""
    if not is_symmetric:
        return zeros
    middle = 1 << (bits - 1)
    return middle if bool((zeros == middle).all()) else None
