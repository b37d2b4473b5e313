"""Shapes of models: what they weigh, and what is refused by name."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from pipeinfer.core.config import BUILTIN, model_directory
from pipeinfer.core.errors import UserError
from pipeinfer.costs.paths import BENCHMARKS
from pipeinfer.costs.shapes import Shape, read_shape
from stages.checkpoint.checkpoint import expected_tensors, layer_tensors
from stages.checkpoint.spec import ModelSpec

SHIPPED = sorted((BENCHMARKS / "models").glob("*.toml"))
PUBLISHED = {  # weights as the models' own pages count them, norms and biases included
    "llama-2-70b": 68.98e9,
    "llama-2-7b": 6.738e9,
    "tinyllama-1.1b": 1.100e9,
    "goliath-120b": 117.75e9,
    "xwinlm-7b": 6.738e9,
    "xwinlm-13b": 13.016e9,
    "falcon-180b": 179.52e9,
    "falcon-40b": 41.84e9,
    "falcon-7b": 7.217e9,
}
SMALL = Shape(
    "small", layers=3, hidden=8, heads=4, kv_heads=2, head_dim=2, intermediate=16, vocab=10, gated=True, tied=False,
    weight_bits=4.0, dtype="fp32", slot_bits=16.0,
)  # fmt: skip


def test_sizes_by_hand() -> None:
    assert SMALL.layer_numel == 8 * 8 + 2 * (8 * 4) + 8 * 8 + 3 * (8 * 16)  # q; k and v; o; gate, up and down
    assert SMALL.head_numel == 80
    assert SMALL.numel == 3 * 576 + 2 * 80
    assert SMALL.head_in_layers == pytest.approx(80 / 576)
    assert SMALL.nbytes(SMALL.layer_numel) == 288.0
    assert SMALL.slot_nbytes == 2 * 2 * 2 * 2
    assert SMALL.row_nbytes == 8 * 4
    assert replace(SMALL, gated=False).layer_numel == 576 - 8 * 16
    assert replace(SMALL, tied=True).numel == 3 * 576 + 80


def test_a_model_may_be_held_in_another_dtype() -> None:
    assert not SMALL.stored_as_computed
    held = SMALL.held_in("bf16")
    assert held.stored_as_computed
    assert (held.nbytes(576), held.slot_nbytes, held.row_nbytes) == (1152.0, 16.0, 16)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_shape_is_read_and_has_its_sources(path: Path) -> None:
    shape = read_shape(path.stem)
    assert shape.name == path.stem
    assert shape.numel == pytest.approx(PUBLISHED.get(path.stem, shape.numel), rel=1e-3)
    words = tomllib.loads(path.read_text())
    assert all(len(table["source"]) > 10 for table in words.values() if isinstance(table, dict))


def test_the_studies_pairs_are_there() -> None:
    assert PUBLISHED.keys() < {path.stem for path in SHIPPED}


@pytest.mark.parametrize("part", ["target", "draft"])
def test_the_built_in_pair_is_what_its_files_say(part: str) -> None:
    directory = model_directory(BUILTIN, part)
    shape = read_shape(str(directory))
    assert replace(shape, name=f"builtin-{part}") == read_shape(f"builtin-{part}")
    spec = ModelSpec.read(directory)
    layer = sum(len(size) == 2 and size[0] * size[1] for size in layer_tensors(spec, 0).values())
    whole = sum(len(size) == 2 and size[0] * size[1] for size in expected_tensors(spec).values())
    assert (shape.layer_numel, shape.numel) == (layer, whole)
    assert read_shape(BUILTIN).layers == read_shape("builtin-target").layers


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"no gpt-5 in benchmarks/models; .*falcon-180b"):
        read_shape("gpt-5")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("layers = 22", "", "shape.layers is missing"),
        ("layers = 22", "layers = 22.5", "shape.layers must be a whole number"),
        ("layers = 22", "layers = 0", "shape.layers must be a positive number"),
        ("layers = 22", "layers = 22\nexperts = 8", "shape.experts is unknown"),
        ("kv_heads = 4", "kv_heads = 5", "shape.kv_heads must divide the 32 heads"),
        ("gated = true", "gated = 1", "shape.gated must be true or false"),
        ("bits = 4.86", "bits = -4.86", "weights.bits must be a positive number"),
        ('dtype = "fp32"', 'dtype = "fp8"', "arithmetic.dtype must be fp32 or bf16 or fp16, not 'fp8'"),
        ("[kv_cache]", "[unknown]", "unknown is unknown"),
        ("[weights]", "[arithmetic2]", "arithmetic2 is unknown"),
        ("title", "name", "name is unknown"),
    ],
)
def test_what_is_wrong_is_refused_by_name(old: str, new: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = (BENCHMARKS / "models" / "tinyllama-1.1b.toml").read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as refusal:
        read_shape(str(path))
    assert f"mine.toml: {says}" in str(refusal.value)


def test_no_number_goes_without_a_source(tmp_path: Path) -> None:
    text = (BENCHMARKS / "models" / "tinyllama-1.1b.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text.replace('source = "llama.cpp\'s default: KV cache in half precision"', ""))
    with pytest.raises(UserError, match=r"mine\.toml: kv_cache\.source is missing"):
        read_shape(str(path))
