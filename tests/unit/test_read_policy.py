"""Policies from files and from the command line; every refusal is one line that names the thing and the fix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeinfer.core.errors import UserError
from speculation.schedules.policy import CONTINUOUS, PLAIN, POLICIES, Policy, read_policy

BASELINES = sorted((Path(__file__).parents[2] / "benchmarks" / "baselines").glob("*.toml"))


def written(tmp_path: Path, text: str, name: str = "mine.toml") -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_built_in_ones_are_read_by_name() -> None:
    assert [read_policy(name) for name in POLICIES] == [PLAIN, CONTINUOUS]


def test_a_file_is_named_after_itself_and_starts_from_the_defaults(tmp_path: Path) -> None:
    assert read_policy(written(tmp_path, "rows = 3\nlead = 7\n")) == Policy("mine", rows=3, lead=7)


def test_a_file_may_start_from_a_built_in_policy(tmp_path: Path) -> None:
    path = written(tmp_path, 'base = "continuous"\nfloor = 0.5\ncancel = "off"\nreuse = false\n')
    assert read_policy(path) == replace(CONTINUOUS, name="mine", floor=0.5, cancel="off", reuse=False)


def test_a_file_may_name_itself(tmp_path: Path) -> None:
    assert read_policy(written(tmp_path, 'name = "ours"\n')).name == "ours"


def test_changes_are_made_last_and_in_order(tmp_path: Path) -> None:
    path = written(tmp_path, "rows = 3\n")
    changes = ["rows=5", "rows=6", "speculate=false", "p_accept=0.25", "schedule=frontier", 'cancel="relay"', "name=x"]
    assert read_policy(path, changes) == Policy(
        "x", rows=6, speculate=False, p_accept=0.25, schedule="frontier", cancel="relay"
    )
    assert read_policy("plain", ["rows=2"]) == replace(PLAIN, rows=2)
    assert PLAIN.rows == 1, "the built-in ones stay as they are"


def test_a_whole_number_is_a_real_one_too() -> None:
    assert read_policy("plain", ["floor=1"]).floor == 1.0
    assert isinstance(read_policy("plain", ["floor=1"]).floor, float)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rows = ", ["mine.toml", "no TOML file", "correct it"]),
        ("rows = 3\nrows = 4\n", ["mine.toml", "no TOML file"]),
        ('base = "bold"\n', ["mine.toml", "base 'bold'", "plain, continuous"]),
        ("base = []\n", ["mine.toml", "base []", "plain, continuous"]),
        ("rowz = 3\n", ["mine.toml", "no knob 'rowz'", "rows, width"]),
        ('rows = "three"\n', ["mine.toml", "rows is not of type int", "correct it"]),
        ("rows = 3.0\n", ["rows is not of type int"]),
        ("rows = true\n", ["rows is not of type int"]),
        ("speculate = 1\n", ["speculate is not of type bool"]),
        ("floor = true\n", ["floor is not of type float"]),
        ("cancel = 3\n", ["cancel is not of type str"]),
        ("[rows]\nmost = 3\n", ["rows is not of type int"]),
        ("rows = 0\n", ["policy mine: rows must be 1 to", "not 0", "correct the number"]),
        ("floor = nan\n", ["floor must be 0 to 1, not nan"]),
        ("p_decay = -0.1\n", ["p_decay must be 0 to 1, not -0.1"]),
        ("lookup = -1\n", ["lookup must be 0 or more, not -1"]),
        ("lead = 1000001\n", ["lead must be 0", "not 1000001"]),
        ("width = 64\nleaves = 64\n", ["leaves x width"]),
        ('schedule = "chaos"\n', ["schedule must be continuous, rounds or frontier, not 'chaos'"]),
        ('cancel = "perhaps"\n', ["cancel must be direct, relay or off, not 'perhaps'"]),
    ],
    ids=lambda value: repr(value) if isinstance(value, str) else "",
)
def test_what_is_wrong_in_a_file_is_refused_in_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        read_policy(written(tmp_path, text))
    assert "\n" not in str(refusal.value)
    assert not [word for word in words if word not in str(refusal.value)], str(refusal.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("rows", ["--set rows", "knob=value"]),
        ("rowz=3", ["--set rowz=3", "no knob 'rowz'"]),
        ("base=plain", ["--set base=plain", "no knob 'base'"]),
        ("rows=many", ["--set rows=many", "rows is not of type int"]),
        ("rows=", ["--set rows=", "rows is not of type int"]),
        ("rows=-1", ["rows must be 1 to", "not -1"]),
        ("=3", ["--set =3", "no knob ''"]),
        ("speculate=yes", ["speculate is not of type bool"]),
    ],
)
def test_what_is_wrong_in_a_change_is_refused_in_one_line(change: str, words: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        read_policy("plain", [change])
    assert "\n" not in str(refusal.value), str(refusal.value)
    assert not [word for word in words if word not in str(refusal.value)], str(refusal.value)


def test_a_change_is_one_knob() -> None:
    with pytest.raises(UserError, match="rows is not of type int"):
        read_policy("plain", ["rows=3\nwidth=2"])


def test_a_policy_that_nobody_knows_is_refused_in_one_line(tmp_path: Path) -> None:
    for name in ("bold", str(tmp_path / "missing.toml"), str(tmp_path), ""):
        with pytest.raises(UserError, match="plain, continuous or a TOML file") as refusal:
            read_policy(name)
        assert "\n" not in str(refusal.value)


def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "odd.toml"
    path.write_bytes(b"rows = \xff\n")
    with pytest.raises(UserError, match=r"odd\.toml is no TOML file") as refusal:
        read_policy(str(path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_every_rival_can_be_read_and_its_knobs_turned(path: Path) -> None:
    policy = read_policy(str(path))
    assert policy.name == path.stem
    assert policy.speculate
    assert read_policy(str(path), ["rows=2"]) == replace(policy, rows=2)


def test_every_schedule_and_ablation_is_among_the_rivals() -> None:
    found = {path.stem: read_policy(str(path)) for path in BASELINES}
    assert {policy.schedule for policy in found.values()} == {"continuous", "rounds", "frontier"}
    assert (found["pipeinfer"].schedule, found["pipeinfer"].cancel, found["pipeinfer"].cancel_rows) == (
        "frontier", "relay", False,
    )  # fmt: skip
