"""The keys and values that a KV slot may hold: those whose products stay finite.

A hidden slot's value is multiplied by 0, and 0 times NaN is NaN, so NaN and infinity would reach rows that must not
attend to the slot. A key whose score overflows would do so too. Models in use have no numbers near MOST.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 1e18
"""128 products of two such numbers stay below the largest float32, and bfloat16 has its range."""


def may_stand(states: Tensor) -> Tensor:
    """Whether a slot may hold each of the keys or values ``states``: bool, of the shape of ``states``."""
    return states.abs() < MOST


def all_may_stand(states: Tensor) -> bool:
    """Whether a slot may hold all of ``states``; NaN is never allowed."""
    return states.numel() == 0 or bool(states.abs().amax() < MOST)


def tamed(states: Tensor) -> Tensor:
    """``states`` with 0 for numbers that a slot may not hold; the others keep their bits."""
    return torch.where(may_stand(states), states, 0.0)
