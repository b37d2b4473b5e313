"""Requests, orders and outputs as dictionaries for JSON: one pair of functions for each type.

The parent of spawned ranks (spawn.py) and rank 0 (worker.py) use the same functions, so no field can be lost between
them. Every field of a type is a key. Each ``*_from_dict`` also takes what JSON made of the dictionary (tuples as
lists). It raises KeyError or TypeError for keys that are missing or unknown.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from launch.requests import Cancel, Close, Order, RequestOutput, Submit
from pipeinfer.core.errors import PipeinferError
from pipeinfer.core.messages import TopToken
from pipeinfer.core.ports import Request, RequestStats, Sampling


def request_to_dict(request: Request) -> dict[str, Any]:
    """Turn ``request`` into a dictionary. Integers of other libraries become Python's."""
    return {
        "prompt": [int(token) for token in request.prompt],
        "max_new_tokens": int(request.max_new_tokens),
        "stop_tokens": sorted(int(token) for token in request.stop_tokens),
        "sampling": asdict(request.sampling),
        "priority": int(request.priority),
    }


def request_from_dict(found: dict[str, Any]) -> Request:
    """Return the request that request_to_dict turned into ``found``."""
    return Request(**{
        **found,
        "prompt": tuple(found["prompt"]),
        "stop_tokens": frozenset(found["stop_tokens"]),
        "sampling": Sampling.from_dict(found["sampling"]),
    })  # fmt: skip


def order_to_dict(order: Order) -> dict[str, Any]:
    """Turn ``order`` into a dictionary with one key: ``submit``, ``cancel`` or ``close``."""
    if isinstance(order, Submit):
        return {"submit": {"number": order.number, "request": request_to_dict(order.request)}}
    return {"cancel": order.number} if isinstance(order, Cancel) else {"close": True}


def order_from_dict(found: dict[str, Any]) -> Order:
    """Return the order that order_to_dict turned into ``found``."""
    if "submit" in found:
        return Submit(found["submit"]["number"], request_from_dict(found["submit"]["request"]))
    return Cancel(found["cancel"]) if "cancel" in found else Close()


def output_to_dict(output: RequestOutput) -> dict[str, Any]:
    """Turn ``output`` into a dictionary. Of an error only its message is kept."""
    found = {member.name: getattr(output, member.name) for member in fields(output)}
    error = output.error
    return found | {
        "stats": None if output.stats is None else asdict(output.stats),
        "error": None if error is None else str(error) or type(error).__name__,
    }


def output_from_dict(found: dict[str, Any]) -> RequestOutput:
    """Return the output that output_to_dict turned into ``found``. An error becomes a PipeinferError."""
    return RequestOutput(**{
        **found,
        **{name: tuple(found[name]) for name in ("tokens", "logps", "load")},
        "tops": tuple(tuple(TopToken(*pair) for pair in top) for top in found["tops"]),
        "stats": None if found["stats"] is None else RequestStats(**found["stats"]),
        "error": None if found["error"] is None else PipeinferError(found["error"]),
    })  # fmt: skip
