"""Rotary position embedding: the frequencies of each kind of scaling, and the angles' cosines and sines.

The operations and their order are those of transformers, so that cosines and sines agree with it bit for bit in
float32. An angle that is off by one rounding is multiplied by the position.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stages.checkpoint.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int, context: int) -> tuple[Tensor, float]:
    """Radians per position, float32 [head_dim / 2], and the factor on cosine and sine.

    ``context`` is the model's max_position_embeddings."""
    # "dynamic" scales only beyond the context (transformers 5 reads only max_position_embeddings),
    # which the engine never exceeds: up to the context it equals "default".
    periods = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    frequencies = 1.0 / periods
    if rope.kind == "linear":
        return frequencies / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, frequencies), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, periods, head_dim), _yarn_attention_factor(rope)
    return frequencies, 1.0


def _llama3(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Long waves are stretched by the factor, short ones kept, those between blended."""
    longest, shortest = rope.original_context / rope.low_freq_factor, rope.original_context / rope.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > longest, frequencies / rope.factor, frequencies)
    keep = (rope.original_context / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - keep) * stretched / rope.factor + keep * stretched
    between = (wavelengths >= shortest) & (wavelengths <= longest)
    return torch.where(between, blended, stretched)


def _yarn(rope: RopeSpec, periods: Tensor, head_dim: int) -> Tensor:
    """Keep dimensions that rotate often within the original context and stretch those that rotate rarely, with a ramp
    between them over the dimensions."""

    def dimension(rotations: float) -> float:
        return head_dim * math.log(rope.original_context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # as transformers: no division by zero
    ramp = torch.clamp((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first), 0, 1)
    keep = 1 - ramp
    return 1.0 / (rope.factor * periods) * (1 - keep) + 1.0 / periods * keep


def _yarn_attention_factor(rope: RopeSpec) -> float:
    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def cosines_sines(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """float32 [rows, head_dim / 2] each, for int64 ``positions`` [rows]."""
    angles = positions[:, None].float() * frequencies
    return angles.cos() * factor, angles.sin() * factor
