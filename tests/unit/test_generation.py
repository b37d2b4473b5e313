"""generation_config.json is taken as transformers' generate takes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeinfer.core.errors import CheckpointError
from pipeinfer.core.ports import GREEDY, Sampling
from pipeinfer.engine.generation import model_sampling

DRAWN = Sampling(1.0, 50, 1.0, 0.0, 1.0)


def write(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, GREEDY),
        ({"temperature": 0.6, "top_p": 0.9}, GREEDY),
        ({"do_sample": False, "top_p": 0.5, "repetition_penalty": 1.25}, replace(GREEDY, repetition_penalty=1.25)),
        ({"do_sample": None, "top_k": 5}, GREEDY),
        ({"do_sample": True}, DRAWN),
        ({"do_sample": True, "top_k": None, "temperature": None}, DRAWN),
        ({"do_sample": True, "top_k": 0}, replace(DRAWN, top_k=0)),
        (
            {"do_sample": True, "temperature": 0.5, "top_k": 20, "top_p": 0.75, "min_p": 0.125}
            | {"repetition_penalty": 2},
            Sampling(0.5, 20, 0.75, 0.125, 2.0),
        ),
        ({"do_sample": True, "temperature": 0.7}, replace(DRAWN, temperature=0.699999988079071)),
    ],
    ids=str,
)
def test_what_counts(tmp_path: Path, fields: dict[str, Any], expected: Sampling) -> None:
    found = model_sampling(write(tmp_path, fields | {"eos_token_id": 3, "max_new_tokens": 9}))
    assert (found.sampling, found.ignored) == (expected, ())


def test_defaults_are_those_of_transformers() -> None:
    from transformers import GenerationConfig

    known = GenerationConfig._get_default_generation_params()
    assert known["do_sample"] is False and known["repetition_penalty"] == 1.0
    assert (known["temperature"], known["top_k"], known["top_p"]) == (DRAWN.temperature, DRAWN.top_k, DRAWN.top_p)


def test_no_file_is_greedy(tmp_path: Path) -> None:
    assert model_sampling(tmp_path).sampling == GREEDY


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        ({"num_beams": 4, "no_repeat_ngram_size": 3, "length_penalty": 2.0}, ("num_beams", "no_repeat_ngram_size")),
        ({"num_beams": 1, "no_repeat_ngram_size": 0, "suppress_tokens": [], "guidance_scale": 1.0}, ()),
        ({"suppress_tokens": [1], "bad_words_ids": [[2]], "forced_eos_token_id": 0}, None),
        ({"typical_p": 0.5, "epsilon_cutoff": 0.1}, ()),
        ({"do_sample": True, "typical_p": 0.5, "epsilon_cutoff": 0.1}, ("typical_p", "epsilon_cutoff")),
        ({"penalty_alpha": 0.6, "top_k": 4}, ("penalty_alpha",)),
        ({"do_sample": True, "penalty_alpha": 0.6}, ()),
    ],
    ids=str,
)
def test_what_is_ignored_is_named(tmp_path: Path, fields: dict[str, Any], ignored: tuple[str, ...] | None) -> None:
    found = model_sampling(write(tmp_path, fields)).ignored
    assert set(found) == (set(fields) if ignored is None else set(ignored))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"do_sample": "yes"}, "do_sample must be true or false, not 'yes'"),
        ({"do_sample": True, "temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"do_sample": True, "temperature": -1}, "temperature -1; use 0"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature must be a number, not nan"),
        ({"do_sample": True, "temperature": 10**400}, "temperature must be a number"),
        ({"do_sample": True, "top_k": 5.5}, "top_k must be a number, not 5.5"),
        ({"do_sample": True, "top_k": -2}, "top_k -2; use 0"),
        ({"do_sample": True, "top_p": 0}, "top_p 0; use a number above 0"),
        ({"do_sample": True, "min_p": [1]}, "min_p must be a number"),
        ({"repetition_penalty": 0}, "repetition_penalty 0; use 1"),
        ({"repetition_penalty": True}, "repetition_penalty must be a number, not True"),
    ],
    ids=str,
)
def test_damage_is_refused_by_file_and_key(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        model_sampling(write(tmp_path, fields))
    assert f"generation_config.json: {says}" in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read as JSON"):
        model_sampling(tmp_path)
