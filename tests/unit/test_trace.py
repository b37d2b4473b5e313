"""A trace on disk: everything comes back as it was, and what is damaged is read as far as it goes."""

from __future__ import annotations

import contextlib
import errno
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeinfer.core.config import Config
from pipeinfer.core.errors import UserError
from pipeinfer.core.messages import Body, DraftNode, Message, Nodes, Run, TopToken
from pipeinfer.core.ports import (
    Abandon,
    Aborted,
    Batch,
    Closed,
    Command,
    Compute,
    Computed,
    Emit,
    Event,
    Finish,
    Halt,
    Idle,
    Note,
    Received,
    Request,
    RequestStats,
    Sampling,
    SamplingInputs,
    Score,
    Send,
    Stalled,
    Started,
    Submitted,
    Wake,
    Woke,
)
from pipeinfer.core.slots import batch_in_order
from pipeinfer.core.wire import VERSION
from pipeinfer.runtime.replay import difference
from pipeinfer.runtime.trace import FORMAT, MARK, TENSOR, Header, Step, Trace, TraceWriter, raised, refuse_unwritable
from tests.unit.bodies import bodies

ROLES = [0, 1, 0x8000]
HEADER = Header(2, 4, ROLES, {"context": 64}, {"target": "builtin"}, [2, 4], "here", "0", 0.1)

REAL, WORD = st.floats(), st.integers(0, 2**32 - 1)
COUNT, TOKEN = st.integers(0, 4), st.integers(-(2**31), 2**31 - 1)
INTEGER = st.integers(-(2**63), 2**63 - 1)


def arrays(count: int) -> st.SearchStrategy[Any]:
    return st.lists(INTEGER, min_size=count, max_size=count).map(lambda values: np.array(values, np.int64))


def batches(rows: int, others: int) -> st.SearchStrategy[Batch]:
    ranges = arrays(2 * others).map(lambda values: values.reshape(-1, 2))
    canonical, each = st.lists(ranges, max_size=2).map(tuple), arrays(rows)
    return st.builds(Batch, each, each, each, canonical, each, each, arrays(others), each)


BODIES = bodies(REAL)
MESSAGES = st.builds(Message, WORD, WORD, st.sampled_from(list(BODIES)).flatmap(BODIES.__getitem__), WORD, WORD)
PAYLOADS = st.sampled_from([None, TENSOR])
BIASED = st.lists(st.tuples(TOKEN, REAL), max_size=3).map(tuple)
OPTIONAL = st.none() | COUNT
SAMPLINGS = st.builds(
    Sampling, REAL, WORD, REAL, REAL, REAL, st.integers(0, 2**64 - 1), REAL, REAL, COUNT, WORD, OPTIONAL, BIASED
)
TUPLES, REALS = st.lists(INTEGER, max_size=4).map(tuple), st.lists(REAL, max_size=4).map(tuple)
SEEN = st.lists(COUNT.flatmap(arrays), max_size=3).map(tuple)
ROW_SAMPLINGS = st.lists(SAMPLINGS, max_size=3).map(tuple)
DRAWS = st.builds(SamplingInputs, ROW_SAMPLINGS, COUNT.flatmap(arrays), SEEN, st.booleans(), SEEN, st.just(()), TUPLES)
TOPS = st.lists(st.builds(TopToken, TOKEN, REAL), max_size=2).map(tuple)
WORDS = st.fixed_dictionaries({"slope": REAL, "offsets": st.lists(REAL, max_size=2)})
LEARNT = st.dictionaries(st.text(), WORDS, max_size=2)
CHOICES = st.lists(st.lists(st.tuples(TOKEN, REAL), max_size=3), max_size=3)
EVENTS: dict[type, st.SearchStrategy[Any]] = {
    Started: st.builds(Started),
    Received: st.builds(Received, MESSAGES, PAYLOADS),
    Computed: st.builds(
        Computed, INTEGER, PAYLOADS, st.none() | CHOICES, REAL, st.dictionaries(COUNT, COUNT, max_size=2)
    ),
    Submitted: st.builds(
        Submitted, st.builds(Request, TUPLES, INTEGER, st.frozensets(TOKEN, max_size=3), SAMPLINGS), COUNT
    ),
    Aborted: st.builds(Aborted, COUNT),
    Closed: st.builds(Closed),
    Stalled: st.builds(Stalled),
    Woke: st.builds(Woke),
}
COMMANDS: dict[type, st.SearchStrategy[Any]] = {
    Send: st.builds(Send, MESSAGES, PAYLOADS),
    Compute: st.builds(
        Compute,
        INTEGER,
        st.tuples(COUNT, COUNT).flatmap(lambda shape: batches(*shape)),
        PAYLOADS,
        st.none() | TUPLES,
        TUPLES,
        COUNT,
        st.none() | DRAWS,
    ),
    Abandon: st.builds(Abandon, INTEGER),
    Wake: st.builds(Wake, REAL),
    Emit: st.builds(Emit, TUPLES, REALS, COUNT, st.lists(TOPS, max_size=2).map(tuple)),
    Score: st.builds(Score, REALS, COUNT, st.lists(TOPS, max_size=2).map(tuple)),
    Finish: st.builds(Finish, st.text(), COUNT, st.none() | COUNT),
    Idle: st.builds(Idle, st.builds(RequestStats, *[COUNT] * 8, REAL, REAL, COUNT, REAL, REAL, LEARNT), COUNT),
    Note: st.builds(Note, st.text()),
    Halt: st.builds(Halt),
}
STEPS = st.builds(
    Step,
    st.sampled_from(ROLES),
    st.one_of(*EVENTS.values()),
    st.floats(allow_nan=False),
    st.lists(st.one_of(*COMMANDS.values()), max_size=3).map(tuple),
)


def written(folder: Path, steps: list[Step]) -> Path:
    with contextlib.closing(TraceWriter(str(folder / "trace"), HEADER)) as writer:
        for step in steps:
            writer.write(step.address, step.event, step.now, list(step.commands))
        return writer.path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


def example() -> list[Step]:
    found: list[Step] = []
    for number in range(5):
        nodes = (DraftNode(7, number, 0, -0.1 * number),)
        message = Message(0x8000, 0, Nodes(1, number, number == 3, nodes), number)
        found.append(Step(0, Received(message), 0.1 * number, (Emit((number,), (-1e-300,)), Note("\n\ud800"))))
    return found


def test_every_kind_has_a_strategy() -> None:
    assert EVENTS.keys() == set(get_args(Event))
    assert COMMANDS.keys() == set(get_args(Command))
    assert BODIES.keys() == set(get_args(Body))


@given(st.lists(STEPS, max_size=4))
def test_what_is_read_is_what_was_written(folder: Path, steps: list[Step]) -> None:
    trace = Trace(written(folder, steps))
    read = list(trace.steps())
    assert trace.damage == ""
    assert trace.header == HEADER
    assert difference(steps, read) == ""


def test_of_activations_only_their_presence_is_kept(folder: Path) -> None:
    hidden, message = np.ones((3, 4)), Message(1, 2, Run(3))
    batch = batch_in_order([4, 5])
    step = Step(1, Received(message, hidden), 0.0, (Send(message, hidden), Compute(1, batch, hidden)))
    (read,) = Trace(written(folder, [step])).steps()
    assert isinstance(read.event, Received)
    assert read.event.payload == TENSOR
    assert [getattr(command, "payload", None) or getattr(command, "hidden", None) for command in read.commands] == [
        TENSOR,
        TENSOR,
    ]


def test_numbers_of_numpy_are_numbers(folder: Path) -> None:
    choices: Any = [[(np.int64(3), np.float64(0.1)), (np.int32(4), np.float32(0.5))]]
    (read,) = Trace(written(folder, [Step(1, Computed(1, None, choices), 0.0, ())])).steps()
    assert read.event == Computed(1, None, [[(3, 0.1), (4, 0.5)]])


def test_what_no_trace_can_hold_is_an_error(folder: Path) -> None:
    what: Any = object()
    with pytest.raises(TypeError, match="cannot hold object"):
        written(folder, [Step(0, Started(), 0.0, (Note(what),))])


def test_a_cut_trace_is_read_as_far_as_it_goes(folder: Path) -> None:
    steps = example()
    path = written(folder, steps)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for length in range(len(lines[0]), len(whole)):
        path.write_bytes(whole[:length])
        trace = Trace(path)
        count = whole[:length].count(b"\n")
        assert list(trace.steps()) == steps[: count - 1]
        assert trace.damage == ("" if whole[:length].endswith(b"\n") else f"line {count + 1} is cut off")


@given(st.data())
def test_damage_is_named_and_ends_the_reading(folder: Path, data: st.DataObject) -> None:
    steps = example()
    path = written(folder, steps)
    whole = bytearray(path.read_bytes())
    start = whole.index(b"\n") + 1
    place = data.draw(st.integers(start, len(whole) - 2))
    if whole[place] != ord("\n"):
        whole[place] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    trace = Trace(path)
    read = list(trace.steps())
    number = whole[:place].count(b"\n") - 1  # of the step that may be damaged
    assert read[:number] == steps[:number]
    if len(read) < len(steps):
        assert trace.damage.startswith(f"line {len(read) + 2} is ")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "null",
        "[1]",
        '[0,0,["Started"]]',
        '[0,7,["Started"],[]]',
        '[0,0,["Vanished"],[]]',
        '[0,0,["Started",1],[]]',
        '[0,0,["Started"],[["Compute",1,[[1],[2],[3],[1,9,"eJw="]]]]]',
        '[0,0,["Received",["Vanished",0,0,[],0,0],false],[]]',
        '[0,0,["Received",["Close",0,0,[],0,0],false],[]]',
        '[0,0,["Received",["Close",0,0,[1,2],0,0],false],[]]',
        '[0,0,["Received",["Run",0,0,[1,false,false,3,0,0,[],[]],0,0],false],[]]',
        '[0,0,["Received",["Run",0,0,[1,false,false,2,0,0,[[9,0,0,0,0]],[]],0,0],false],[]]',
        '[0,0,["Received",["Run",0,0,[1,false,false,2,0,0,[],[[1,2,3,4,5,6]]],0,0],false],[]]',
        '[0,0,["Received",["Run",0,0,[1,false,false,2,0,0,[]],0,0],false],[]]',
        '[0,0,["Received",["Result",0,0,[1,false,0,0,[],[[7,-0.5]]],0,0],false],[]]',
        '[0,0,["Received",["Close",0,0,[1],0,0,0],false],[]]',
        "[" * 100_000,
    ],
)
def test_a_line_that_is_no_event_is_damage(line: str, folder: Path) -> None:
    path = written(folder, example())
    with path.open("a") as file:
        file.write(f"{line}\n")
    trace = Trace(path)
    assert len(list(trace.steps())) == len(example())
    assert trace.damage.startswith("line 7 is damaged (")


@pytest.mark.parametrize(
    ("first", "says"),
    [
        ("", "is no trace"),
        ("not JSON", "is no trace"),
        ("[]", "is no trace"),
        ("{}", "is no trace"),
        (f'{{"{MARK}": {FORMAT}, "protocol": {VERSION}}}', "is no trace"),
        (f'{{"{MARK}": 77, "protocol": {VERSION}}}', "made by another version"),
        (f'{{"{MARK}": {FORMAT}, "protocol": 2}}', "made by another version"),
        ("\udcff", "is no trace"),
    ],
)
def test_what_is_no_trace_is_refused(first: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(first.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=says):
        Trace(path)


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        Trace(tmp_path / "missing")
    with pytest.raises(UserError, match="Is a directory"):
        Trace(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "folder/", "missing/trace", "file/trace", "x" * 300, "a\0b", "taken"])
def test_a_name_that_cannot_be_written_is_refused_and_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "taken.rank1").mkdir()
    with pytest.raises(UserError, match=r"^the trace .*; name "):
        refuse_unwritable(name, 2)
    if name not in ("", ".", "folder/", "taken"):
        with pytest.raises(UserError, match=r"^the trace .* cannot be written"):
            TraceWriter(name, HEADER)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "taken.rank1"}


def test_a_name_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "trace.rank1").write_text("of an older job")
    refuse_unwritable(str(tmp_path / "trace"), 3)
    assert (tmp_path / "trace.rank1").read_text() == "of an older job"
    assert len(list(tmp_path.iterdir())) == 1


class Full:
    """A file on a disk that has room for so many bytes."""

    def __init__(self, room: int) -> None:
        self.held, self.room, self.closed = b"", room, False

    def write(self, data: bytes) -> int:
        if len(self.held) == self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.held += data[: self.room - len(self.held)]
        return min(len(data), self.room)

    def close(self) -> None:
        self.closed = True


def test_a_full_disk_ends_the_trace_and_is_told_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = TraceWriter(str(folder / "full"), HEADER)
    writer.close()
    full: Any = Full(100)
    writer._file = full
    for step in example() * 2:
        writer.write(step.address, step.event, step.now, list(step.commands))
    assert full.closed
    assert len(full.held) == 100
    assert capsys.readouterr().err == f"pipeinfer: the trace {writer.path} ends here (No space left on device)\n"


def test_a_disk_that_is_full_at_once_refuses_the_job(tmp_path: Path) -> None:
    (tmp_path / "trace.rank2").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"trace.rank2 cannot be written \(No space left on device\)"):
        TraceWriter(str(tmp_path / "trace"), HEADER)


def test_where_a_trace_goes_is_no_part_of_what_ranks_must_agree_on() -> None:
    here, there = Config(trace="here"), Config(trace="there")
    assert here.digest() == there.digest() == Config().digest()
    assert here.digest() != Config(dtype="bf16", trace="here").digest()
    assert Config.of(json.loads(json.dumps(asdict(here)))) == here


def test_what_raised_is_a_note() -> None:
    assert raised(ValueError("so")) == Note("raised ValueError: so")


def test_lines_are_json_and_there_at_once(folder: Path) -> None:
    """Whoever watches a hanging job sees everything up to the hang."""
    writer = TraceWriter(str(folder / "watched"), replace(HEADER, rank=0))
    for count, step in enumerate(example(), 1):
        writer.write(step.address, step.event, step.now, list(step.commands))
        lines = writer.path.read_text().splitlines()
        assert len(lines) == 1 + count
        assert json.loads(lines[-1])[0] == step.now
    writer.close()
