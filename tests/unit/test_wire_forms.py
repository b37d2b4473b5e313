"""Requests, orders and outputs survive JSON in every field."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from launch.requests import Cancel, Close, Order, RequestOutput, Submit
from launch.wire_forms import (
    order_from_dict,
    order_to_dict,
    output_from_dict,
    output_to_dict,
    request_from_dict,
    request_to_dict,
)
from pipeinfer.core.errors import PipeinferError
from pipeinfer.core.messages import TopToken
from pipeinfer.core.ports import Request, RequestStats, Sampling

BIASES = ((0, 0.1), (2**31 - 1, -1e-300))
SAMPLING = Sampling(0.1 + 0.2, 40, 0.95, 5e-324, 1.1, 2**64 - 1, -0.1, 1e-9, 20, 7, 0, BIASES, '{"a":"\\u00e9"}')
REQUEST = Request((1, 2**31, 3), 7, frozenset({9, 2}), SAMPLING, -4)
LEARNT = {"drafter 0": {"slope": 0.1, "revision": 3, "outcomes": 2**40, "offsets": [-0.5, 1e-300]}}
STATS = RequestStats(1, 2, 3, 4, 5, 6, 7, 8, 9, 0.25, 1e-9, 12, 0.1, 0.7, LEARNT)
TOPS = ((TopToken(5, -0.25), TopToken(2**31, -1e-300)), ())
OUTPUT = RequestOutput(1e6 + 1e-9, (5, 6), "error", STATS, (-0.25, -math.inf), TOPS, (3, 4), 2**40, 0, None, True)


def through_json(found: dict[str, Any]) -> dict[str, Any]:
    again: dict[str, Any] = json.loads(json.dumps(found))
    return again


@pytest.mark.parametrize("sample", [SAMPLING, REQUEST, STATS, OUTPUT], ids=lambda sample: type(sample).__name__)
def test_the_samples_leave_no_field_at_its_default(sample: Any) -> None:
    kept = [member.name for member in fields(sample) if getattr(sample, member.name) == member.default]
    assert kept == (["error"] if sample is OUTPUT else [])


def test_every_field_of_a_request_survives() -> None:
    assert request_from_dict(through_json(request_to_dict(REQUEST))) == REQUEST


@pytest.mark.parametrize("output", [OUTPUT, RequestOutput(0.0)])
def test_every_field_of_an_output_survives(output: RequestOutput) -> None:
    assert output_from_dict(through_json(output_to_dict(output))) == output


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_floats_that_are_not_finite_survive(value: float) -> None:
    output = output_from_dict(through_json(output_to_dict(RequestOutput(0.0, (1,), logps=(value,)))))
    assert repr(output.logps) == repr((value,))


@pytest.mark.parametrize(("error", "told"), [(PipeinferError("no memory"), "no memory"), (KeyError(), "KeyError")])
def test_the_message_of_an_error_survives(error: Exception, told: str) -> None:
    output = output_from_dict(through_json(output_to_dict(RequestOutput(0.0, reason="error", error=error))))
    assert (type(output.error), str(output.error), output.is_last) == (PipeinferError, told, True)


@pytest.mark.parametrize("order", [Submit(7, REQUEST), Cancel(0), Close()])
def test_orders_survive(order: Order) -> None:
    assert order_from_dict(through_json(order_to_dict(order))) == order


def test_integers_of_numpy_become_those_of_python() -> None:
    """A program may count tokens with NumPy; JSON refused such a number in the middle of a submission."""
    counted = Request(tuple(np.array([1, 2])), np.int64(3), frozenset(np.array([4])))  # type: ignore[arg-type]
    assert request_from_dict(through_json(request_to_dict(counted))) == Request((1, 2), 3, frozenset({4}))


@pytest.mark.parametrize(
    ("to_dict", "from_dict", "sample"),
    [(request_to_dict, request_from_dict, REQUEST), (output_to_dict, output_from_dict, OUTPUT)],
)
def test_missing_and_unknown_fields_are_refused(to_dict: Any, from_dict: Any, sample: Any) -> None:
    found = to_dict(sample)
    with pytest.raises(TypeError):
        from_dict(found | {"other": 1})
    for name in ("prompt", "tokens"):
        with pytest.raises((KeyError, TypeError)):
            from_dict({key: value for key, value in found.items() if key != name} if name in found else {})
