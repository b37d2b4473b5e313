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
    assert read_policy(written(tmp_path, "max_rows = 3\nmax_ahead = 7\n")) == Policy("mine", max_rows=3, max_ahead=7)


def test_a_file_may_start_from_a_built_in_policy(tmp_path: Path) -> None:
    path = written(tmp_path, 'base = "continuous"\nmin_path_prob = 0.5\ncancel = "off"\nreuse = false\n')
    assert read_policy(path) == replace(CONTINUOUS, name="mine", min_path_prob=0.5, cancel="off", reuse=False)


def test_a_file_may_name_itself(tmp_path: Path) -> None:
    assert read_policy(written(tmp_path, 'name = "ours"\n')).name == "ours"


def test_changes_are_made_last_and_in_order(tmp_path: Path) -> None:
    path = written(tmp_path, "max_rows = 3\n")
    changes = [
        "max_rows=5",
        "max_rows=6",
        "speculate=false",
        "p_accept=0.25",
        "schedule=pipeinfer",
        'cancel="relay"',
        "name=x",
    ]
    assert read_policy(path, changes) == Policy(
        "x", max_rows=6, speculate=False, p_accept=0.25, schedule="pipeinfer", cancel="relay"
    )
    assert read_policy("plain", ["max_rows=2"]) == replace(PLAIN, max_rows=2)
    assert PLAIN.max_rows == 1, "the built-in ones stay as they are"


def test_a_whole_number_is_a_real_one_too() -> None:
    assert read_policy("plain", ["min_path_prob=1"]).min_path_prob == 1.0
    assert isinstance(read_policy("plain", ["min_path_prob=1"]).min_path_prob, float)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_rows = ", ["mine.toml", "no TOML file", "correct it"]),
        ("max_rows = 3\nmax_rows = 4\n", ["mine.toml", "no TOML file"]),
        ('base = "bold"\n', ["mine.toml", "base 'bold'", "plain, continuous"]),
        ("base = []\n", ["mine.toml", "base []", "plain, continuous"]),
        ("rowz = 3\n", ["mine.toml", "no knob 'rowz'", "max_rows, topk"]),
        ('max_rows = "three"\n', ["mine.toml", "max_rows is not of type int", "correct it"]),
        ("max_rows = 3.0\n", ["max_rows is not of type int"]),
        ("max_rows = true\n", ["max_rows is not of type int"]),
        ("speculate = 1\n", ["speculate is not of type bool"]),
        ("min_path_prob = true\n", ["min_path_prob is not of type float"]),
        ("cancel = 3\n", ["cancel is not of type str"]),
        ("[max_rows]\nmost = 3\n", ["max_rows is not of type int"]),
        ("max_rows = 0\n", ["policy mine: max_rows must be 1 to", "not 0", "correct the number"]),
        ("min_path_prob = nan\n", ["min_path_prob must be 0 to 1, not nan"]),
        ("p_decay = -0.1\n", ["p_decay must be 0 to 1, not -0.1"]),
        ("prompt_lookup = -1\n", ["prompt_lookup must be 0 or more, not -1"]),
        ("max_ahead = 1000001\n", ["max_ahead must be 0", "not 1000001"]),
        ("topk = 64\ndraft_batch = 64\n", ["draft_batch x topk"]),
        ('schedule = "chaos"\n', ["schedule must be continuous, rounds or pipeinfer, not 'chaos'"]),
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
        ("max_rows", ["--set max_rows", "knob=value"]),
        ("rowz=3", ["--set rowz=3", "no knob 'rowz'"]),
        ("base=plain", ["--set base=plain", "no knob 'base'"]),
        ("max_rows=many", ["--set max_rows=many", "max_rows is not of type int"]),
        ("max_rows=", ["--set max_rows=", "max_rows is not of type int"]),
        ("max_rows=-1", ["max_rows must be 1 to", "not -1"]),
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
    with pytest.raises(UserError, match="max_rows is not of type int"):
        read_policy("plain", ["max_rows=3\ntopk=2"])


def test_a_policy_that_nobody_knows_is_refused_in_one_line(tmp_path: Path) -> None:
    for name in ("bold", str(tmp_path / "missing.toml"), str(tmp_path), ""):
        with pytest.raises(UserError, match="plain, continuous or a TOML file") as refusal:
            read_policy(name)
        assert "\n" not in str(refusal.value)


def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "odd.toml"
    path.write_bytes(b"max_rows = \xff\n")
    with pytest.raises(UserError, match=r"odd\.toml is no TOML file") as refusal:
        read_policy(str(path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_every_rival_can_be_read_and_its_knobs_turned(path: Path) -> None:
    policy = read_policy(str(path))
    assert policy.name == path.stem
    assert policy.speculate or not policy.balance, "a rival drafts, or is another kind of plain decoding"
    assert read_policy(str(path), ["max_rows=2"]) == replace(policy, max_rows=2)


def test_every_schedule_and_ablation_is_among_the_rivals() -> None:
    found = {path.stem: read_policy(str(path)) for path in BASELINES}
    assert {policy.schedule for policy in found.values()} == {"continuous", "rounds", "pipeinfer"}
    assert (found["pipeinfer"].schedule, found["pipeinfer"].cancel, found["pipeinfer"].cancel_rows) == (
        "pipeinfer", "relay", False,
    )  # fmt: skip
