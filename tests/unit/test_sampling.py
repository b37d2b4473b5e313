"""What may be asked of sampling: every rank computes with the same bits, and nonsense is refused by name."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeinfer.core.errors import UserError
from pipeinfer.core.messages import Message, Settings
from pipeinfer.core.sampling import GREEDY, LEAST, MOST, MOST_STOPS, Sampling, checked_stops, exact
from pipeinfer.core.wire import decode, encode

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.just(0.0) | st.floats(1e-5, MOST),
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(1e-30, 1.0),
    min_p=st.floats(0.0, 1.0),
    repetition_penalty=st.floats(1e-5, MOST),
    seed=st.integers(0, 2**64 - 1),
    presence_penalty=st.floats(-2.0, 2.0),
    frequency_penalty=st.floats(-2.0, 2.0),
    top_logprobs=st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100.0, 100.0), max_size=4).map(
        lambda biases: tuple(biases.items())
    ),
)


@given(SAMPLINGS)
def test_an_exact_sampling_survives_the_journey(sampling: Sampling) -> None:
    found = exact(sampling)
    assert exact(found) == found
    reals = (found.temperature, found.top_p, found.min_p, found.repetition_penalty)
    for value in (*reals, found.presence_penalty, found.frequency_penalty, *dict(found.logit_bias).values()):
        assert struct.unpack("<f", struct.pack("<f", value)) == (value,)
    assert (found.top_k, found.seed) == (sampling.top_k, sampling.seed)
    assert found.temperature == pytest.approx(sampling.temperature, rel=1e-6)
    assert Sampling.from_dict(json.loads(json.dumps(asdict(found)))) == found
    assert found.logit_bias == tuple(sorted(found.logit_bias))
    assert dict(found.logit_bias).keys() == dict(sampling.logit_bias).keys()
    message = decode(encode(Message(0, 1, found.settings(5, 17))))
    assert isinstance(message.body, Settings)
    assert (message.body.sequence, Sampling.of(message.body)) == (5, replace(found, prompt_length=17))


def test_greedy_is_exact() -> None:
    assert exact(GREEDY) == GREEDY == exact(Sampling(temperature=1e-60))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-1.0, 1e-6, 2e5, 1e300, float("inf"), float("nan")]),
        ("top_k", [-1, 2**31]),
        ("top_p", [0.0, -0.5, 1.001, float("nan")]),
        ("min_p", [-0.5, 1.001, float("nan")]),
        ("repetition_penalty", [0.0, -1.0, 1e6, float("inf"), float("nan")]),
        ("seed", [-1, 2**64]),
        ("presence_penalty", [-2.01, 2.01, float("nan")]),
        ("frequency_penalty", [-2.01, 2.01, float("inf")]),
        ("top_logprobs", [-1, 21]),
        ("prompt_logprobs", [-1, 21]),
    ],
)
def test_what_nobody_can_mean_is_refused(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UserError, match=f"^{name} .*; use "):
            exact(replace(GREEDY, **{name: value}))


@pytest.mark.parametrize(
    "biases",
    [
        ((-1, 1.0),),
        ((2**31, 1.0),),
        ((1, 100.5),),
        ((1, float("nan")),),
        ((1, 1.0), (1, 2.0)),
        tuple((token, 1.0) for token in range(301)),
    ],
)
def test_biases_that_nobody_can_mean_are_refused(biases: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(UserError, match="logit_bias"):
        exact(replace(GREEDY, logit_bias=biases))
    assert exact(replace(GREEDY, logit_bias=((7, 0.5), (3, -100.0)))).logit_bias == ((3, -100.0), (7, 0.5))


def test_the_bounds_themselves_are_allowed() -> None:
    for bound in (LEAST, 1e-5, MOST):
        assert exact(Sampling(bound, repetition_penalty=bound)).temperature == pytest.approx(bound, rel=1e-6)


def test_stop_strings() -> None:
    assert checked_stops("one") == checked_stops(["one"]) == ("one",)
    assert checked_stops([]) == ()
    for stops, says in (
        ([""], "empty stop string"),
        (["\udcff"], "not UTF-8"),
        (["x"] * (MOST_STOPS + 1), "at most 16"),
    ):
        with pytest.raises(UserError, match=says):
            checked_stops(stops)
