"""Which keys and values may stand in a slot: those whose products stay finite, whatever reads them.

A hidden slot is multiplied by 0 and its score by nothing, so NaN and infinity would reach rows that must not see them;
and so would a key so large that its score overflows. No model that works has numbers near MOST.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 1e18
"""128 products of two such numbers stay below the largest float32, and bfloat16 has its range."""


def may_stand(states: Tensor) -> Tensor:
    """Where keys or values may stand in a slot: bool, of the shape of ``states``."""
    return states.abs() < MOST


def all_may_stand(states: Tensor) -> bool:
    """Whether all of them may; NaN may not."""
    return states.numel() == 0 or bool(states.abs().amax() < MOST)


def tamed(states: Tensor) -> Tensor:
    """``states`` with 0 for what may not stand there; the others keep their bits."""
    return torch.where(may_stand(states), states, 0.0)
