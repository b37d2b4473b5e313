"""Codes of 1, 2, 4 or 8 bits in bytes: the first code in the lowest bits."""

from __future__ import annotations

import torch
from torch import Tensor


def bytes_of(codes: Tensor, bits: int, word: int = 8) -> Tensor:
    """``codes``, uint8 [rows, n] below 2^bits, of which bytes hold 8 / bits: uint8 [rows, m]. Rows are filled up with 0
    to a multiple of ``word`` bits."""
    per = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (word // bits)))
    parts = padded.view(len(codes), -1, per)
    found: Tensor = parts[..., 0].clone()
    for index in range(1, per):
        found |= parts[..., index] << (bits * index)
    return found


def codes_of(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first ``count`` codes of each row of ``packed``: what ``bytes_of`` was given."""
    per = 8 // bits
    shifts = torch.arange(per, dtype=torch.uint8) * bits
    codes: Tensor = (packed[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(1)[:, :count].contiguous()
