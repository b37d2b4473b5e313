"""Suites: axes are multiplied, nonsense is refused by name, and every shipped one can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeinfer.bench.contenders import contender
from pipeinfer.bench.peers import is_peer
from pipeinfer.bench.scenario import scenario
from pipeinfer.bench.suite import read_suite
from pipeinfer.core.errors import UserError
from pipeinfer.costs.paths import BENCHMARKS

HEAD = 'title = "a test"\nexecution = "simulated"\npolicies = ["plain"]\n'
SHIPPED = sorted(file.stem for file in (BENCHMARKS / "suites").glob("*.toml"))


def suite_of(text: str, folder: Path) -> Path:
    path = folder / "suite.toml"
    path.write_text(HEAD + text)
    return path


def test_a_table_stands_for_all_combinations_of_its_lists(tmp_path: Path) -> None:
    text = "[[points]]\nstages = [4, 8]\ntop1 = [0.5, 1]\n[[points]]\nranks = 3\nacceptance = [[0.5, 0.2], [0.1]]\n"
    points = read_suite(str(suite_of(text, tmp_path))).points
    assert [(point.ranks, point.top1) for point in points[:4]] == [(5, 0.5), (5, 1.0), (9, 0.5), (9, 1.0)]
    assert [(point.ranks, point.acceptance) for point in points[4:]] == [(3, (0.5, 0.2)), (3, (0.1,))]


def test_stages_are_groups_where_ranks_share_them(tmp_path: Path) -> None:
    text = "[[points]]\nstages = [2, 4]\ntp = [1, 2]\n[[points]]\nranks = 9\ntp = [1, 2, 4]\n"
    points = read_suite(str(suite_of(text, tmp_path))).points
    found = [(point.ranks, point.tp, point.processes("emulated")) for point in points[:4]]
    assert found == [(3, 1, 3), (5, 2, 3), (5, 1, 5), (9, 2, 5)]
    assert [(point.ranks, point.processes("emulated")) for point in points[4:]] == [(9, 9), (9, 5), (9, 3)]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[[points]]\nstage = 4\n", "stage"),
        ("colour = 4\n[[points]]\nstages = 4\n", "colour"),
        ("[[points]]\nstages = 'four'\n", "ranks|str"),
        ("[[points]]\nstages = 4\ntop1 = 1.5\n", "exceed 1"),
        ("[[points]]\nstages = 4\nacceptance = [0.9, 0.2]\n", "exceed 1"),
        ("[[points]]\nstages = 4\nstage_ms = -1\n", "stage_ms"),
        ("[[points]]\nstages = 4\ntokens = 1\n", "two tokens"),
        ("[[points]]\nstages = 4\ntp = 0\n", "tp"),
        ("[[points]]\nstages = 4\ntp = 2\nefficiency = 0\n", "efficiency"),
        ("repeats = 0\n[[points]]\nstages = 4\n", "repeat"),
        ("", "points"),
        ("[[points\n", "cannot be read"),
    ],
)
def test_what_is_no_suite_is_refused_by_name(text: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=word):
        read_suite(str(suite_of(text, tmp_path)))


def test_an_unknown_suite_is_told_which_there_are() -> None:
    with pytest.raises(UserError, match="throughput"):
        read_suite("nowhere")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_suites_mean_something(name: str) -> None:
    suite = read_suite(name)
    assert suite.minutes.get(suite.execution), "say what it took"
    for policy in suite.policies:
        assert is_peer(policy) or contender(policy, suite.points[0].set)
    for point in suite.points:
        if suite.execution != "real":
            assert scenario(point).layers >= point.ranks - 1
