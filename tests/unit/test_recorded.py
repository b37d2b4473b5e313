"""A draft that guesses as a real one did, and the adapters that are taken away while it does."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import adapters
from benchmarks.adapters import ADAPTERS, ALONE, MODULES, TRACE, Place, speed, without, world
from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.ports import Sampling, SamplingInputs
from pipeinfer.core.slots import batch_in_order
from pipeinfer.sim.recorded import STRIDE, Record, RecordedPair, read_records, write_records
from pipeinfer.sim.world import World
from speculation.schedules import many
from speculation.schedules.policy import CONTINUOUS
from stages.models.emulated import finish, plain_tokens

RECORDS = [Record((-0.1, -2.0), 0), Record((-0.5, -1.0), 1), Record((-1.5, -1.75), None)]


def test_records_are_written_and_read(tmp_path: Path) -> None:
    write_records([*RECORDS, Record((-0.123456,), 0)], tmp_path / "x.json")
    assert read_records(tmp_path / "x.json") == [*RECORDS, Record((-0.12,), 0)]


def test_the_choices_at_a_position_are_those_of_its_record() -> None:
    spec, _ = world(Place(1, 1), CONTINUOUS, 0)
    pair = RecordedPair(spec, RECORDS)
    target, draft = pair.stage(range(spec.model.layers), 8), pair.draft(0, 8)
    batch = batch_in_order([5, 6, 7, 8])
    samplings = (Sampling(), Sampling(), Sampling(), Sampling(seed=2))
    draw = SamplingInputs(samplings, np.array([3, 4, 5, 6]))
    truths = [found[0][0] for found in target.sample(finish(target.forward(batch, None)), range(4), 1)]
    hidden = finish(draft.forward(batch, None))
    found = draft.sample(hidden, range(4), 8, draw)
    places = [0, 1, 2, (6 + 2 * STRIDE) % 3]
    assert [tuple(claim for _, claim in choices) for choices in found] == [RECORDS[place].claims for place in places]
    hits = [[token for token, _ in choices].index(truth) if truth in dict(choices) else None
            for choices, truth in zip(found, truths, strict=True)]  # fmt: skip
    assert hits == [RECORDS[place].hit for place in places]
    assert all(len(dict(choices)) == len(choices) for choices in found)
    with pytest.raises(LocalProtocolError, match="positions"):
        draft.sample(hidden, range(4), 8)


def test_the_trace_of_the_built_in_pair() -> None:
    records = read_records(TRACE)
    right = sum(one.hit == 0 for one in records) / len(records)
    assert len(records) > 1000 and 0.6 < right < 0.95
    assert all(sorted(one.claims, reverse=True) == list(one.claims) for one in records)


@pytest.mark.parametrize("place", [Place(1, 4), Place(3, 2, "late"), *ALONE[:1]])
def test_tokens_are_those_of_plain_decoding(place: Place) -> None:
    spec, pair = world(place, CONTINUOUS, 1)
    spec = replace(spec, requests=tuple(replace(one, max_new_tokens=24) for one in spec.requests))
    answers = World(spec, pair=pair).run()
    for answer, request in zip(answers, spec.requests, strict=True):
        assert answer.tokens == plain_tokens(spec.model, request.prompt, 24, frozenset())
        assert answer.stats is not None and answer.stats.accepted > 0


def test_a_draft_that_is_never_right_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "TOKENS", 24)
    wrong, right = (speed(Place(1, 4, costs), CONTINUOUS, None, 0) for costs in ("wrong", "rows"))
    assert wrong < right / 1.5


def test_every_constant_is_there_and_comes_back() -> None:
    for one in ADAPTERS:
        assert one.places
        for name, value in one.constants:
            module, attribute = name.split(".")
            home = importlib.import_module(MODULES.get(module, f"speculation.schedules.{module}"))
            before = getattr(home, attribute)
            with without(one):
                assert getattr(home, attribute) == value != before
            assert getattr(home, attribute) == before


def test_without_an_adapter_others_are_as_they_were() -> None:
    before = many.LONGEST
    with without(None):
        assert before == many.LONGEST
    names = [one.name for one in ADAPTERS]
    assert len(set(names)) == len(names)
