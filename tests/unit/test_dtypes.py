"""In which dtype weights are held, and who has to agree on what."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launch.preflight import clear
from pipeinfer.core.config import AUTO, DTYPES, Config, resolve_dtype
from pipeinfer.core.errors import UserError
from stages.checkpoint.spec import stored_dtype


@pytest.mark.parametrize(
    ("stored", "expected"),
    [("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32"), ("float64", "fp32"), ("", "fp32"), (None, "fp32")],
)
def test_auto_is_what_the_checkpoint_says_where_every_rank_has_the_kernels(stored: str | None, expected: str) -> None:
    assert resolve_dtype(AUTO, stored, has_kernels=True) == expected
    assert resolve_dtype(AUTO, stored, has_kernels=False) == "fp32"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_kernels", [False, True])
def test_what_is_asked_for_is_had(dtype: str, has_kernels: bool) -> None:
    assert resolve_dtype(dtype, "bfloat16", has_kernels) == dtype
    cleared = clear(Config(dtype=dtype), 1, has_kernels)
    assert cleared.config.dtype == dtype
    assert bool(cleared.note) == (not has_kernels)  # it says what torch costs


def speculative(**more: object) -> Config:
    """The built-in pair, with its draft."""
    return Config(policy={"name": "continuous"}, **more)  # type: ignore[arg-type]


def test_preflight_resolves_each_model(tmp_path: Path) -> None:
    directory = tmp_path / "draft"
    directory.mkdir()
    builtin = Config().draft_directories[0]
    for file in builtin.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    asked = speculative(drafts=("builtin", str(directory)))
    assert stored_dtype(directory) == "float16"
    found = clear(asked, 3, has_kernels=True)
    assert (found.config.dtype, found.config.draft_dtypes, found.note) == ("bf16", ("bf16", "fp16"), "")
    assert clear(found.config, 3, has_kernels=False).config == found.config  # it is resolved already
    without = clear(asked, 3, has_kernels=False)
    assert (without.config.dtype, without.config.draft_dtypes) == ("fp32", ("fp32", "fp32"))
    assert "16-bit weights held in fp32" in without.note
    assert "\n" not in without.note


def test_what_ranks_must_agree_on() -> None:
    config = speculative()
    same = replace(config, threads=3, trace="here")
    assert same.digest() == config.digest()
    for other in ({"dtype": "bf16"}, {"numerics": "fast"}, {"activations": "int8"}, {"draft_dtypes": ("bf16",)}):
        assert replace(config, **other).digest() != config.digest()  # type: ignore[arg-type]
    assert clear(config, 1, True).config.digest() != clear(config, 1, False).config.digest()


def test_a_config_survives_json_and_may_be_older() -> None:
    config = clear(speculative(threads=2, numerics="fast", activations="int8"), 1, True).config
    words = json.loads(json.dumps(asdict(config)))
    assert Config.of(words) == config
    for name in ("numerics", "activations", "threads", "draft_dtypes"):
        del words[name]
    assert Config.of(words).draft_dtypes == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "fp8"}, "unknown dtype 'fp8'; use one of auto, fp32, bf16, fp16"),
        ({"numerics": "exact"}, "unknown numerics 'exact'; use one of portable, fast"),
        ({"activations": "int4"}, "unknown activations 'int4'; use one of fp32, int8"),
        ({"threads": 0}, "--threads 0; use 1 to"),
    ],
)
def test_unknown_words_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        clear(replace(Config(), **change), 1)  # type: ignore[arg-type]
