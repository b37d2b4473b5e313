"""`pipeinfer plot`: pictures of traces and of results, the file for viewers, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from pipeinfer.cli import main
from pipeinfer.plots.charts import KNOWN, OTHERS
from pipeinfer.plots.lanes import FILLS, REQUEST_COLOURS, TINT
from pipeinfer.runtime.timeline import Outcome
from speculation.schedules.policy import CONTINUOUS
from tests.cli.run import ROOT, here, pipeinfer
from tests.invariants.traced import trace_world
from tests.unit.crowd import crowd
from tests.unit.test_timeline import world

POLICIES = ("plain", "sync-tree", "continuous", "no-cancel")


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = tmp_path_factory.mktemp("plot") / "world"
    trace_world(world(CONTINUOUS), name)
    return name


def result(policy: str, ranks: int, top1: float | None, speed: float, execution: str = "emulated") -> dict[str, Any]:
    return {
        "suite": "throughput",
        "policy": policy,
        "execution": execution,
        "ranks": ranks,
        "acceptance": None if top1 is None else {"top1": top1, "ranks": [top1]},
        "tokens_per_s": {"median": 2 * speed, "p10": 1.9 * speed, "p90": 2.2 * speed, "n": 3},
        "itl_ms": {"p50": 100 / speed, "p90": 150 / speed, "p99": 200 / speed},
        "ideal_tokens_per_s": 12.0,
        "ratio_to_plain": speed,
        "fingerprint": {"host": "here", "when": "2026-11-25T12:00:00+00:00"},
    }


def sweep() -> Iterator[dict[str, Any]]:
    for ranks in (5, 9):
        for top1 in (0.5, 0.8):
            for place, policy in enumerate(POLICIES):
                yield result(policy, ranks, top1, 1 + place * top1)


def stored(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def colours(path: Path) -> set[tuple[int, ...]]:
    """Those that fill at least a little of a picture."""
    pixels = (255 * imread(path)[..., :3]).round().astype(int).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(color) for color in found[counts > 40].tolist()}


def rgb(name: str) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in to_rgb(name))


def drawn(*arguments: object) -> None:
    assert main(["plot", *map(str, arguments)]) == 0


def test_a_trace_becomes_lanes_in_the_colours_of_outcomes(trace: Path, tmp_path: Path) -> None:
    drawn(trace, "-o", tmp_path / "all.png")
    seen = colours(tmp_path / "all.png")
    happened = set(Outcome) - {Outcome.UNFINISHED}
    assert {rgb(FILLS[outcome]) for outcome in happened} <= seen
    drawn(trace, "-o", tmp_path / "start.png", "--to", "3000")
    zoomed = colours(tmp_path / "start.png")
    assert rgb(FILLS[Outcome.PREFILL]) in zoomed
    assert rgb(FILLS[Outcome.CANCELLED]) not in zoomed, "nothing had been refuted by then"


def test_a_few_requests_have_colours_of_their_own_and_many_those_of_outcomes(tmp_path: Path) -> None:
    for requests, is_few in ((len(REQUEST_COLOURS), True), (len(REQUEST_COLOURS) + 1, False)):
        name = tmp_path / f"world{requests}"
        trace_world(crowd(CONTINUOUS, requests), name)
        drawn(name, "-o", tmp_path / "out.png")
        seen = colours(tmp_path / "out.png")
        for colour in REQUEST_COLOURS:
            pale = tuple(round(255 * (1 - TINT * (1 - part))) for part in to_rgb(colour))
            assert (pale in seen) == is_few, colour
        for colour in {*REQUEST_COLOURS} - {*FILLS.values()}:
            assert (rgb(colour) in seen) == is_few, colour
        assert rgb(FILLS[Outcome.ACCEPTED]) in seen
        (tmp_path / "out.png").unlink()


def test_a_picture_says_what_it_is_of(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")  # text stays text
    drawn(trace, "-o", tmp_path / "lanes.svg", "--from", "20000", "--to", "40000")
    lanes = (tmp_path / "lanes.svg").read_text()
    for words in ("SIMULATED", "policy continuous", "5 ranks on a world", "stage 3", "drafter 0", "cancel, sent"):
        assert words in lanes
    drawn(stored(tmp_path / "rows.jsonl", list(sweep())), "-o", tmp_path / "speed.svg")
    speed = (tmp_path / "speed.svg").read_text()
    for words in ("EMULATED", "throughput", "here", "2026-11-25", "5 ranks", "9 ranks", "times plain", "ideal"):
        assert words in speed
    assert "SIMULATED" not in speed


def test_for_viewers_a_trace_becomes_json(trace: Path, tmp_path: Path) -> None:
    drawn(trace, "-o", tmp_path / "run.json")
    assert len(json.loads((tmp_path / "run.json").read_text())["traceEvents"]) > 1000
    drawn(*(f"{trace}.rank{rank}" for rank in range(5)), "-o", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "run.json").read_text()


def test_a_cut_trace_is_drawn_as_far_as_it_goes(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.rank0"
    cut.write_text(trace.with_name("world.rank0").read_text()[:20000])
    drawn(cut, "-o", tmp_path / "cut.json")
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.endswith("is cut off, the rest is lost\n")
    events = json.loads((tmp_path / "cut.json").read_text())["traceEvents"]
    assert "unfinished" in {event["name"].partition(":")[0] for event in events}


@pytest.mark.parametrize("kind", ["speed", "depth", "itl", "ablation"])
def test_results_are_drawn_in_a_colour_for_each_policy(kind: str, tmp_path: Path) -> None:
    rows = stored(tmp_path / "rows.jsonl", list(sweep()))
    drawn(rows, "--kind", kind, "-o", tmp_path / "out.png")
    wanted = {rgb(KNOWN[policy]) for policy in POLICIES if policy in KNOWN} | {rgb(OTHERS[0])}
    assert wanted <= colours(tmp_path / "out.png")


def test_the_kind_follows_from_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")
    everything = list(sweep())
    at_one_rate = [row for row in everything if row["acceptance"]["top1"] == 0.8]
    at_one_point = [row for row in at_one_rate if row["ranks"] == 9]
    real = [result(policy, 4, None, 2, "real") | {"ratio_to_plain": None} for policy in POLICIES]
    for rows, axis in (
        (everything, "the draft's first choice is right"),
        (at_one_rate, ">ranks<"),
        (at_one_point, ">times plain<"),
        (real, ">tokens/s<"),
    ):
        drawn(stored(tmp_path / "rows.jsonl", rows), "-o", tmp_path / "out.svg")
        assert axis in (tmp_path / "out.svg").read_text()


def test_several_files_are_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("matplotlib").rcParams, "svg.fonttype", "none")
    one = stored(tmp_path / "one.jsonl", [result("plain", 4, None, 1, "real")])
    two = stored(tmp_path / "two.jsonl", [result("plain", 4, None, 1, "simulated")])
    drawn(one, two, "-o", tmp_path / "out.svg")
    text = (tmp_path / "out.svg").read_text()
    assert "REAL + SIMULATED" in text, "they are told apart"
    assert ">REAL<" in text and ">SIMULATED<" in text


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["plot", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pipeinfer: ")
    assert err.count("\n") == 1
    return err


def test_refusals(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = stored(tmp_path / "rows.jsonl", list(sweep()))
    real = stored(tmp_path / "real.jsonl", [result("plain", 4, None, 1, "real") | {"itl_ms": None}])
    many = stored(tmp_path / "many.jsonl", [result("plain", ranks, 0.5, 1) for ranks in range(2, 40)])
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "words.jsonl").write_text('{"policy": "plain"}\n')
    png = tmp_path / "out.png"
    for arguments, words in (
        ((trace, "-o", "out.jpg"), "--output out.jpg; end it in .png, .svg, .pdf or .json"),
        ((trace, "--kind", "speed", "-o", png), "--kind speed of a trace"),
        ((trace, "--from", "5", "--to", "4", "-o", png), "nothing lies between 5 and 4 ms; the trace goes from 0 to "),
        ((trace, "--from", "1e9", "-o", png), "nothing lies between 1e+09"),
        ((f"{trace}.rank1", "-o", png), "world.rank1 does not tell what was accepted"),
        ((trace, "-o", tmp_path / "no" / "out.png"), "no/out.png cannot be written (No such file or directory)"),
        ((rows, "--kind", "timeline", "-o", png), "rows.jsonl is no trace"),
        ((rows, "--to", "5", "-o", png), "rows.jsonl is no trace"),
        ((rows, "-o", tmp_path / "out.json"), "rows.jsonl is no trace"),
        ((real, "--kind", "speed", "-o", png), "no row has a forced acceptance"),
        ((real, "--kind", "itl", "-o", png), "no row says what its ITL was"),
        ((many, "--kind", "itl", "-o", png), "38 panels, for ranks differ"),
        ((tmp_path / "empty.jsonl", "-o", png), "empty.jsonl: no rows"),
        ((tmp_path / "words.jsonl", "-o", png), "words.jsonl, line 1 is no result (KeyError: 'tokens_per_s')"),
        ((tmp_path / "missing", "-o", png), "missing cannot be read (No such file or directory)"),
    ):
        assert words in refused(capsys, *arguments)
    assert not png.exists()


def test_without_matplotlib_pictures_are_refused_and_the_file_for_viewers_is_not(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = refused(capsys, trace, "-o", tmp_path / "run.png")
    fix = "pip install 'pipeinfer[plot]', or -o FILE.json for ui.perfetto.dev"
    assert said == f"pipeinfer: pictures need matplotlib; {fix}\n"
    drawn(trace, "-o", tmp_path / "run.json")


def test_neither_torch_nor_mpi_nor_matplotlib_are_loaded_for_viewers(trace: Path, tmp_path: Path) -> None:
    heavy = "{'torch', 'mpi4py', 'transformers', 'tokenizers', 'safetensors', 'matplotlib', 'rich'}"
    program = f"import sys; from pipeinfer.cli import main; main(sys.argv[1:]); print({heavy} & set(sys.modules))"
    line = [sys.executable, "-c", program, "plot", str(trace), "-o", str(tmp_path / "run.json")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.slow
def test_a_run_with_traces_leaves_the_file_for_viewers(tmp_path: Path) -> None:
    name = tmp_path / "run"
    arguments = ["--prompt", "def f", "--max-new-tokens", "24", "--ignore-eos", "--trace", str(name)]
    done = pipeinfer("run", "--ranks", "3", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith(f"{name}.json shows the run at ui.perfetto.dev\n")
    found = json.loads(Path(f"{name}.json").read_text())
    assert found["otherData"].items() >= {"execution": "real", "policy": "continuous", "ranks": 3}.items()
    counts = [event["args"] for event in found["traceEvents"] if event["ph"] == "C" and event["name"] == "tokens"]
    assert counts[-1] == {"committed": 24}
    name.with_name("run.json").unlink()
    name.with_name("run.json").mkdir()
    again = here("run", "--ranks", "1", *arguments)
    assert again.returncode == 0, "the answer was given"
    assert "run.json cannot be written (Is a directory)" in again.stderr
