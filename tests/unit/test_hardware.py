"""Hardware descriptions: what is read, and what is refused by name."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeinfer.core.errors import UserError
from pipeinfer.core.links import Link
from pipeinfer.costs.hardware import KINDS, Arithmetic, Curve, read_hardware
from pipeinfer.costs.paths import BENCHMARKS

SHIPPED = sorted((BENCHMARKS / "hardware").glob("*.toml"))
NUMBERS = {
    "processor.cores": 4,
    "memory.capacity": 8e9,
    "memory.bandwidth": 50e9,
    "link.latency": 2e-5,
    "link.bandwidth": 1e9,
    "fp32.peak": 1e11,
    "fp32.overhead": 1e-5,
}


def figure(name: str, value: object, more: str = "") -> str:
    return f'[{name}]\nvalue = {value}\nkind = "sustained"\nsource = "a test"\n{more}'


def curve(name: str, rows: object, bandwidth: object) -> str:
    return f'[{name}]\nrows = {rows}\nbandwidth = {bandwidth}\nkind = "sustained"\nsource = "a test"\n'


def written(tmp_path: Path, *more: str, without: str = "", title: str = 'title = "a machine"\n') -> str:
    path = tmp_path / "mine.toml"
    figures = [figure(name, value) for name, value in NUMBERS.items() if name != without]
    path.write_text("\n".join([title, *figures, *more]), encoding="utf-8")
    return str(path)


def test_every_number_is_read(tmp_path: Path) -> None:
    slots = curve("bf16.attention", [1, 8], [4e9, 2e9])
    more = [figure("bf16.peak", 4e11), figure("bf16.overhead", 2e-5), slots]
    found = read_hardware(written(tmp_path, *more))
    assert (found.name, found.title, found.cores) == ("mine", "a machine", 4)
    assert (found.memory_nbytes, found.bandwidth) == (8_000_000_000, 50e9)
    assert found.link == Link(delay_s=2e-5, bandwidth=1e9)
    assert found.arithmetic == {
        "fp32": Arithmetic(peak=1e11, overhead_s=1e-5),
        "bf16": Arithmetic(peak=4e11, overhead_s=2e-5, attention=Curve((1, 8), (4e9, 2e9))),
    }


def test_formats_of_weights_have_curves(tmp_path: Path) -> None:
    found = read_hardware(written(tmp_path, curve("weights.q4_k", [1, 4], [3e10, 2e10])))
    assert found.weights == {"q4_k": Curve((1, 4), (3e10, 2e10))}
    with pytest.raises(UserError, match="q9_x"):
        read_hardware(written(tmp_path, curve("weights.q9_x", [1], [3e10])))


def test_what_nobody_said_is_nothing(tmp_path: Path) -> None:
    assert read_hardware(written(tmp_path)).arithmetic.keys() == {"fp32"}


def test_a_description_may_start_from_another() -> None:
    infiniband, ethernet = read_hardware("dual-xeon-gold-ib"), read_hardware("dual-xeon-gold-1gbe")
    assert ethernet.arithmetic == infiniband.arithmetic
    assert ethernet.bandwidth == infiniband.bandwidth
    assert ethernet.link == read_hardware("dual-xeon-e5-1gbe").link
    assert ethernet.link.bandwidth < infiniband.link.bandwidth / 100


def test_a_curve_is_linear_in_time_between_what_was_measured() -> None:
    found = Curve((1, 2, 4), (10e9, 5e9, 4e9))  # a gigabyte takes 0.1, 0.2 and 0.25 s
    assert [found.seconds(1e9, rows) for rows in (1, 2, 4)] == [0.1, 0.2, 0.25]
    assert found.seconds(1e9, 3) == pytest.approx(0.225)
    assert found.seconds(1e9, 16) == pytest.approx(1.0), "beyond, in proportion to the rows"
    assert found.seconds(5e8, 2) == pytest.approx(0.1)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_missing_number_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"mine\.toml: {name} is missing; correct it"):
        read_hardware(written(tmp_path, without=name))


@pytest.mark.parametrize("value", [0, -1, "nan", "inf", "true", '"4"', "[4]"])
def test_what_is_no_positive_number_is_refused_by_name(value: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"link\.latency\.value must be a positive number, not"):
        read_hardware(written(tmp_path, figure("link.latency", value), without="link.latency"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("[gpu]\nvalue = 1\n", "gpu is unknown; there are title, base, processor"),
        (figure("memory.latency", 1), "memory.latency is unknown; there are capacity, bandwidth"),
        (figure("bf16.peak", 1, "unit = 'MB'\n"), "bf16.peak.unit is unknown"),
        ('[bf16.peak]\nvalue = 1\nkind = "sustained"\n', "bf16.peak.source is missing"),
        ('[bf16.peak]\nvalue = 1\nsource = "x"\n', "bf16.peak.kind is missing"),
        ('[bf16.peak]\nvalue = 1\nkind = "sure"\nsource = "x"\n', "kind must be nominal or sustained or assumed"),
        ('[bf16.peak]\nvalue = 1\nkind = "nominal"\nsource = " "\n', "bf16.peak.source must be a text"),
        ("[bf16]\npeak = 4e11\n", "bf16.peak must be a table, not 400000000000.0"),
        ("bf16 = 3\n", "bf16 must be a table, not 3"),
        (figure("bf16.peak", 1), "bf16.overhead is missing"),
        (curve("fp32.linear", [2, 4], [1, 1]), "fp32.linear.rows must be whole numbers that ascend from 1"),
        (curve("fp32.linear", [1, 4, 2], [1, 1, 1]), "fp32.linear.rows must be whole numbers that ascend from 1"),
        (curve("fp32.linear", [1, 1.5], [1, 1]), "fp32.linear.rows must be whole numbers that ascend from 1"),
        (curve("fp32.linear", [1, 2], [1]), "fp32.linear.bandwidth has 1 numbers for 2 numbers of rows"),
        (curve("fp32.linear", [], []), "fp32.linear.rows must be a list of numbers"),
        (curve("fp32.linear", [1], [-1]), "fp32.linear.bandwidth must be a positive number"),
        ("x = \n", "cannot be read"),
    ],
)
def test_what_is_wrong_is_refused_by_name(more: str, says: str, tmp_path: Path) -> None:
    place = {"title": f'title = "a machine"\n{more}'} if more.startswith("bf16 =") else {}
    with pytest.raises(UserError) as refusal:
        read_hardware(written(tmp_path, *([] if place else [more]), **place))
    assert says in str(refusal.value)
    assert "mine.toml" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_no_chains_of_bases(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="base dual-xeon-gold-1gbe has a base itself"):
        read_hardware(written(tmp_path, title='title = "x"\nbase = "dual-xeon-gold-1gbe"\n'))


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"no cray in benchmarks/hardware; .*dual-xeon-gold-ib, h200"):
        read_hardware("cray")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_number_has_a_kind_and_a_source(path: Path) -> None:
    assert read_hardware(path.stem).title
    for name, table in leaves(tomllib.loads(path.read_text())):
        assert table["kind"] in KINDS, name
        assert len(table["source"]) > 5, name
        assert ("assumed" in table["source"] or "unverified" in table["source"]) == (table["kind"] == "assumed"), name


def leaves(words: dict[str, Any], within: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in words.items():
        if isinstance(value, dict) and "source" in value:
            yield within + key, value
        elif isinstance(value, dict):
            yield from leaves(value, f"{within}{key}.")
        else:
            assert (within, key) in {("", "title"), ("", "base")}, f"{within}{key} is a number without a source"
