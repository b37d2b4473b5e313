"""The addresses of roles: the orchestrator, the stages in pipeline order, the drafters."""

from __future__ import annotations

ORCHESTRATOR = 0
FIRST_STAGE = 1
FIRST_DRAFTER = 0x8000


def stage_address(index: int) -> int:
    """The address of the ``index``-th stage, counted from 0."""
    return FIRST_STAGE + index


def drafter_address(index: int) -> int:
    """The address of the ``index``-th drafter, counted from 0."""
    return FIRST_DRAFTER + index


def address_name(address: int) -> str:
    """An address as people read it: ``orchestrator``, ``stage 3``, ``drafter 0``."""
    if address == ORCHESTRATOR:
        return "orchestrator"
    return f"drafter {address - FIRST_DRAFTER}" if address >= FIRST_DRAFTER else f"stage {address - FIRST_STAGE}"
