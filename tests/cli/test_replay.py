"""What `pipeinfer replay` says of traces: whole, cut, different, or no traces at all."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeinfer.cli import main
from pipeinfer.cli.request_table import COLUMNS, MOST_SHOWN, table
from pipeinfer.core.ports import Request
from pipeinfer.core.wire import VERSION
from pipeinfer.runtime.request_times import RequestTimes
from pipeinfer.runtime.trace import FORMAT, MARK
from pipeinfer.sim.world import World, WorldSpec
from speculation.schedules.policy import CONTINUOUS
from stages.models.emulated import EmulatedSpec, spread
from tests.cli.run import ROOT, here
from tests.invariants.traced import trace_world
from tests.unit.crowd import crowd

WORLD = WorldSpec(
    seed=3,
    policy=CONTINUOUS,
    stages=2,
    requests=(Request((1, 2, 3), 150),),
    model=EmulatedSpec(layers=4, vocab=40, seed=2, ranks=spread(0.8)),
    row_cost=1.0,  # so that the governor has something to decide
)


def header(protocol: int = VERSION) -> str:
    """The first line of a trace, with nothing in its job's numbers."""
    words = {MARK: FORMAT, "protocol": protocol, "rank": 0, "ranks": 1, "roles": [0], "job_spec": {}}
    return json.dumps(words) + "\n"


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return trace_world(WORLD, tmp_path / "world")


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str], str]:
    """Exit code, lines of standard output, standard error."""
    code = main(["replay", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_whole_traces_by_one_name_or_by_several(paths: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    stale = paths[0].with_name("world.rank3")
    stale.write_text("of an older job with more ranks")
    code, lines, err = told(capsys, paths[0].with_name("world"))
    assert (code, len(lines), err) == (0, 6, "")
    for path, names, line in zip(paths, ("orchestrator, drafter 0", "stage 0", "stage 1"), lines[:3], strict=True):
        events = path.read_text().count("\n") - 1
        assert line.startswith(f"{path} ({names}): {events} events, ")
        assert line.endswith(" commands identical")
    assert told(capsys, *paths) == (code, lines, err)
    paths[1].unlink()  # it was written on another host
    assert told(capsys, paths[0].with_name("world"))[1] == [lines[0], *lines[2:]]
    assert told(capsys, paths[2])[1] == [lines[2]], "without the orchestrator's trace nobody knows the requests"


def test_a_difference_is_told_and_the_others_are_replayed_too(
    paths: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = paths[0].read_text().splitlines()
    number = next(index for index, line in enumerate(lines) if '["Emit"' in line)
    words = json.loads(lines[number])
    next(command for command in words[3] if command[0] == "Emit")[1][0] += 1
    lines[number] = json.dumps(words)
    paths[0].write_text("\n".join(lines) + "\n")
    code, said, err = told(capsys, *paths)
    assert (code, len(said), err) == (1, 3, "")
    assert f"; then orchestrator answers event {number} (Received) differently: commands.0.tokens.0 was " in said[0]
    assert all(line.endswith("identical") for line in said[1:])
    header = json.loads(lines[0])
    paths[0].write_text("\n".join([json.dumps(header | {"version": "0.0.9"}), *lines[1:]]) + "\n")
    assert told(capsys, paths[0])[1][0].endswith(" (the trace was made by version 0.0.9)")


def test_a_cut_trace_is_replayed_as_far_as_it_goes(paths: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    whole = paths[0].read_text().splitlines(keepends=True)
    paths[0].write_text("".join(whole[:10]) + whole[10][:30])
    code, lines, _ = told(capsys, paths[0])
    assert code == 0
    assert "9 events" in lines[0]
    assert lines[0].endswith("identical; line 11 is cut off, the rest is lost")
    paths[0].write_text("".join(whole[:10]))
    line, *rest = told(capsys, paths[0])[1]
    assert line.endswith("identical; then the trace ends, before orchestrator and drafter 0 did")
    assert [row.split()[-1] for row in rest] == ["end", "unfinished", "unfinished"]
    paths[0].write_text("".join([*whole[:5], "[]\n", *whole[6:]]))
    line = told(capsys, paths[0])[1][0]
    assert "4 events" in line
    assert "line 6 is damaged" in line


def test_show_tells_everything_in_the_order_of_time(paths: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, err = told(capsys, "--show", *paths)
    assert (code, err) == (0, "")
    heads, verdicts, lines = lines[:3], lines[-6:-3], lines[:-3]
    assert heads[0] == "rank 0 of 3 on a world: orchestrator, drafter 0, policy continuous"
    assert all(line.endswith("identical") for line in verdicts)
    events = lines[3:-3]
    times = [float(line.split()[0]) for line in events]
    assert times == sorted(times)
    assert times[0] == 0.0
    notes = [line for line in events if " *** " in line]
    count = sum(path.read_text().count("\n") - 1 for path in paths)
    assert len(events) == count + len(notes)
    decided = re.compile(r" orchestrator +\*\*\* probe \d rows: [\d.]+ ms per token with \d")
    assert any(decided.search(line) for line in notes), notes
    text = "\n".join(events)
    for words in (
        "orchestrator  submitted request 0: 3 prompt tokens, 150 new",
        "stage 0       started => Hello to orchestrator",
        " => Settings of 1 to stage 0, drafter 0; Prompt of 1 last (3 tokens) to drafter 0; Run 1 canonical wants last",
        "stage 0       Run 1 canonical wants last (3 rows) from orchestrator => compute 1 (3 rows); ",
        "drafter 0     computed 1, 1 choice => Nodes of 1 (",
        " from drafter 0",
        "emit 1 token of request 0; ",
        " to stage 0, stage 1; Advance of 1 (1 token) to drafter 0",
        "finish request 0: length; ",
        " tombstone from stage 1",
        "orchestrator  closed => Shutdown to stage 0, stage 1, drafter 0; halt",
        "stage 1       Shutdown from orchestrator => halt",
    ):
        assert words in text


def test_clocks_of_several_hosts_are_compared(paths: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A host's own clock starts anywhere; what it took for the time of day is in its trace."""
    for path, host, shift_s in zip(paths, ("one", "one", "two"), (0.0, 0.0, 1000.0), strict=True):
        header, *steps = [json.loads(line) for line in path.read_text().splitlines()]
        moved = [[step[0] + shift_s, *step[1:]] for step in steps]
        header |= {"host": host, "wall_s": 5e8 - shift_s}
        path.write_text("".join(f"{json.dumps(line)}\n" for line in (header, *moved)))
    lines = told(capsys, "--show", *paths)[1]
    first = next(line for line in lines if "stage 1       Run 1 " in line)
    before = next(line for line in lines if "stage 0       computed 1 " in line)
    assert 0 <= float(first.split()[0]) - float(before.split()[0]) < 1


def test_the_table_of_requests_is_what_users_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = crowd(CONTINUOUS)
    answers = World(spec).run()
    code, lines, _ = told(capsys, *trace_world(spec, tmp_path / "crowd"))
    assert code == 0
    heading, *rows, total = [line.split() for line in lines[-2 - len(answers) :]]
    assert heading == list(COLUMNS)
    for answer, request, row in zip(answers, spec.requests, rows, strict=True):
        assert answer.stats is not None
        first_s, last_s = answer.emitted_at[0][0], answer.emitted_at[-1][0]
        speed = (len(answer.tokens) - answer.emitted_at[0][1]) / (last_s - first_s)
        assert row[:5] == [
            str(answer.number),
            str(len(request.prompt)),
            str(len(answer.tokens)),
            f"{1e3 * (first_s - answer.submitted_at):.1f}",
            f"{speed:.1f}",
        ]
        assert row[5:7] == [str(answer.stats.accepted), str(answer.stats.drafted)]
        assert row[8] == answer.reason
    tokens = sum(len(answer.tokens) for answer in answers)
    last_s = max(answer.emitted_at[-1][0] for answer in answers)
    assert total[:3] == ["all", str(sum(len(one.prompt) for one in spec.requests)), str(tokens)]
    assert float(total[4]) == pytest.approx(tokens / last_s, abs=0.06)
    assert sum(int(row[7]) for row in rows) == int(total[7]) > 0, "some were preempted"


def test_of_many_requests_the_first_ones_have_a_line() -> None:
    requests = [RequestTimes(number, number, Request((1,), 1), 0.0) for number in range(MOST_SHOWN + 3)]
    lines = list(table(requests))
    assert len(lines) == MOST_SHOWN + 3
    assert lines[-2] == "... and 3 more requests"
    assert list(table([])) == []


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        ("words\n", "is no trace"),
        (header(protocol=9), "made by another version"),
        (header(), "is damaged"),
    ],
)
def test_what_is_no_trace_is_refused_in_a_line(
    content: str | None, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "odd").write_text(content)
    code, lines, err = told(capsys, tmp_path / "odd")
    assert (code, lines) == (2, [])
    assert err.startswith("pipeinfer: ")
    assert err.count("\n") == 1
    assert says in err
    assert str(tmp_path / "odd") in err


def test_neither_torch_nor_mpi_nor_models_are_loaded(paths: list[Path]) -> None:
    heavy = "{'torch', 'mpi4py', 'transformers', 'tokenizers', 'safetensors'}"
    program = f"import sys; from pipeinfer.cli import main; main(sys.argv[1:]); print({heavy} & set(sys.modules))"
    line = [sys.executable, "-c", program, "replay", "--show", *map(str, paths)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.slow
def test_a_rank_alone_is_traced_and_the_check_after_it_is_not(tmp_path: Path) -> None:
    """--verify decodes once more in the same process: that must not write over the trace."""
    trace = tmp_path / "alone"
    arguments = ["--max-new-tokens", "12", "--ignore-eos", "--trace", str(trace), "--json", "--verify"]
    ran = here("run", "--prompt", "def f", "--ranks", "1", "--policy", "continuous", *arguments)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["config"]["trace"] == str(trace)
    done = here("replay", str(trace))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{trace}.rank0 (orchestrator, drafter 0, stage 0): ")
    assert done.stdout.splitlines()[0].endswith("commands identical")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.json", "alone.rank0"]
