"""The comparison of servers: which of llama.cpp's counts, ratios, equal texts, and what a missing package says."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serving import servers
from benchmarks.serving.client import Sample, load_of
from benchmarks.serving.models import Pair
from benchmarks.serving.servers import Contender, contenders, refuse_missing
from benchmarks.serving.table import COLUMNS, Found, heading, line, remarks, rows
from pipeinfer.core.errors import UserError

OURS, PLAIN, DRAFTED = Contender("pipeinfer-1", ranks=1), Contender("llama.cpp"), Contender("llama.cpp-4", n_max=4)
PAIR = Pair("pair", (Path("t"), Path("d")), (Path("t.gguf"), Path("d.gguf")), "bf16", "fp16", 1024)
TEXTS = ("a", "b")


def sample(
    speed: float, ttft: float = 10.0, tpot: float = 2.0, texts: tuple[str, ...] = TEXTS, given: int = 7
) -> Sample:
    return Sample(float(speed), [ttft] * len(texts), [tpot] * len(texts), given, texts)


FOUND = [
    Found(OURS, [sample(60, 20, 1), sample(90, 20, 1), sample(75, 20, 1)]),
    Found(PLAIN, [sample(50, 5, 4, ("a", "x")), sample(50), sample(40)]),
    Found(DRAFTED, [sample(40, 10, 2), sample(60, 10, 2), sample(55, 10, 2)]),
]


def test_ratios_are_to_the_better_of_llama_cpps() -> None:
    ours, plain, drafted = rows(4, FOUND)
    assert [row["best"] for row in (ours, plain, drafted)] == [False, False, True]
    assert (ours["tokens_per_s"], ours["least"], ours["most"], ours["samples"]) == (75, 60, 90, [60, 90, 75])
    assert ours["ratio"] == pytest.approx(
        {"tokens_per_s": 75 / 55, "least": 75 / 55, "most": 60 / 40, "ttft": 10 / 20, "tpot": 2 / 1}
    )
    assert drafted["ratio"]["tokens_per_s"] == drafted["ratio"]["tpot"] == 1
    assert [row["equal"] for row in (ours, plain, drafted)] == [2, 1, 2]
    assert {row["clients"] for row in (ours, plain, drafted)} == {4}


def test_without_llama_cpp_there_is_no_ratio_and_without_us_no_equal_text() -> None:
    (row,) = rows(1, FOUND[:1])
    assert row["ratio"] is None and row["equal"] == 2 and "-" in line(row).split()
    assert {row["equal"] for row in rows(1, FOUND[1:])} == {None}


def test_lines_stand_under_their_heading() -> None:
    lines = [line(row) for row in rows(16, FOUND)]
    assert {len(one) for one in lines} == {len(heading())}
    assert [one.startswith("* ") for one in lines] == [False, False, True]
    words = lines[0].split()
    assert len(words) == len(COLUMNS) and words[:3] == ["16", "pipeinfer-1", "75.00"] and words[-1] == "2/2"


def test_other_tokens_and_other_texts_of_ours_are_told() -> None:
    assert remarks(FOUND) == []
    two = Found(Contender("pipeinfer-2", ranks=2), [sample(1), sample(1, texts=("a", "y"))])
    assert remarks([*FOUND, two]) == ["pipeinfer-2 has 1 texts that are not those of pipeinfer-1"]
    (told,) = remarks([FOUND[0], dataclasses.replace(FOUND[1], samples=[sample(1, given=8)])])
    assert "not the same tokens" in told and "8" in told


def test_each_contender_has_the_same_threads_context_and_requests_at_a_time() -> None:
    every = contenders([1, 2], [4, 8])
    assert [one.name for one in every] == ["pipeinfer-1", "pipeinfer-2", "llama.cpp", "llama.cpp-4", "llama.cpp-8"]
    lines = [" ".join(one.command(PAIR, 80, 4, 2, "")) for one in every]
    assert "--ranks 1 --threads 2" in lines[0] and "--ranks 2 --threads 1" in lines[1]
    assert all("--context 1024" in one for one in lines)
    assert all("--parallel 4 --context 1024 --threads 2" in one for one in lines[2:])
    assert "--draft" not in lines[2] and "--draft d.gguf --n-max 4" in lines[3]
    named = " ".join(every[4].command(PAIR, 80, 4, 2, "/bin/llama-server"))
    assert named.startswith("/bin/llama-server --model t.gguf") and "--ctx-size 4096" in named
    assert "--spec-draft-n-max 8" in named and "--cache-type-k f16" in named


def test_all_requests_differ_and_are_greedy() -> None:
    load = load_of(["one", "two"], 5, 2, 8)
    bodies = [load.body(key) for key in range(load.distinct)]
    assert len({body["prompt"] for body in bodies}) == 5
    assert {(body["temperature"], body["max_tokens"], body["ignore_eos"]) for body in bodies} == {(0.0, 8, True)}


def test_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        refuse_missing("")
    assert (
        str(caught.value).count("\n") == 0 and "xllamacpp" in str(caught.value) and "pip install" in str(caught.value)
    )
    monkeypatch.setattr(servers, "find_spec", lambda name: object())
    refuse_missing("")
    refuse_missing(sys.executable)
    with pytest.raises(UserError, match="cannot be run"):
        refuse_missing("/no/such/program")


@pytest.mark.parametrize(
    ("words", "says"), [(["--clients", "0"], "--clients below 1"), (["--tokens", "1"], "--tokens below 2")]
)
def test_numbers_that_mean_nothing_are_refused(words: list[str], says: str) -> None:
    line = [sys.executable, "-m", "benchmarks.serve_beside_llama", *words]
    done = subprocess.run(line, cwd=servers.ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
