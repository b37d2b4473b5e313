"""Traces: all that the roles of one rank were told and what they commanded, on disk, so that any run can be replayed.

A rank of a job with ``trace = "FILE"`` writes ``FILE.rankN``, lines of JSON. The first one says what is needed to build
the same machines again (Header), every other one is an event (Step): time, role, event, commands. Nothing that a
machine can see is rounded: floats are written so that they read as the same 64 bits, and messages field by field,
because roles on one rank hand each other more than the wire's 32 bits. Activations are left out; machines never look at
them, and TENSOR stands where there were some. Ranges of canonical slots are compressed.

Each line is handed to the operating system when its event has been answered, before the commands are carried out.
Nothing is buffered here, so nothing has to be flushed, and of a rank that hangs or is killed nothing is lost; at most
the last line is cut. Measured with the built-in pair on four ranks and two cores, an event takes 0.2 to 0.5 KB and 35
to 90 microseconds (medians; between layers the caches are cold, in a loop it is 8 to 23), of which handing over takes 4
to 9 (in a loop 2; with a buffer, 1). A disk that is full ends the trace, not the job. Off, it costs nothing.
"""

from __future__ import annotations

import base64
import heapq
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn, get_args

import numpy as np
import numpy.typing as npt

from pipeinfer.core.errors import refuse
from pipeinfer.core.messages import Message, TopToken
from pipeinfer.core.ports import (
    Batch,
    Command,
    Compute,
    Computed,
    Emit,
    Event,
    Idle,
    Note,
    Received,
    Request,
    RequestStats,
    Sampling,
    SamplingInputs,
    Score,
    Send,
    Submitted,
)
from pipeinfer.core.wire import LAYOUTS, VERSION

FORMAT = 6
MARK = "pipeinfer_trace"
TENSOR = "a tensor"
"""Stands for activations, which are not stored."""
PAYLOADS = ("payload", "hidden")
"""What fields with activations are called."""
MOST_NBYTES = 1 << 28
"""The longest line that is read."""


@dataclass(frozen=True, slots=True)
class Step:
    """One event of one role at ``now`` (seconds, monotonic), and what the role commanded."""

    address: int
    event: Event
    now: float
    commands: tuple[Command, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """Whose trace it is. ``roles``: the addresses that play on ``rank`` of ``ranks``; ``layers``: of its stage, first
    and one past the last. ``job_spec``: the numbers of a JobSpec (job_spec.py), ``config``: the words of a Config.
    ``wall_s``: what has to be added to a time of this trace for seconds of the Unix epoch."""

    rank: int
    ranks: int
    roles: list[int]
    job_spec: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    layers: list[int] | None = None
    host: str = ""
    version: str = ""
    wall_s: float = 0.0
    protocol: int = VERSION


def raised(error: Exception) -> Note:
    """What stands for the commands of a machine that raised ``error`` instead."""
    return Note(f"raised {type(error).__name__}: {error}")


# Writing.


def _form(value: Any) -> Any:
    """What JSON does not know, in what it knows."""
    form = _FORMS.get(type(value))
    if form is not None:
        return form(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(f"a trace cannot hold {type(value).__name__}")


def _all_fields(kind: type) -> Callable[[Any], tuple[Any, ...]]:
    return attrgetter(*(member.name for member in fields(kind)))


def _named(kind: type) -> Callable[[Any], tuple[Any, ...]]:
    """The form of an event or command: its name, then its fields; of activations, whether there are any; of a message,
    the name of its kind, too."""
    names = [member.name for member in fields(kind)]

    def form(value: Any) -> tuple[Any, ...]:
        values = [getattr(value, name) for name in names]
        for place in places:
            values[place] = values[place] is not None
        if message is not None:
            values[message] = values[message].kind, *values[message]
        return kind.__name__, *values

    places = [place for place, name in enumerate(names) if name in PAYLOADS]
    message = names.index("message") if "message" in names else None
    return form


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 1)).decode()


def _batch_form(batch: Batch) -> tuple[Any, ...]:
    rows = (batch.tokens, batch.positions, batch.slots)
    canonical = [_packed(ranges.tobytes()) for ranges in batch.canonical]
    attended = (batch.sequence, batch.prefix, batch.ancestors, batch.ancestor_ends)
    return *(array.tolist() for array in rows), canonical, *(array.tolist() for array in attended)


def _draw_form(draw: SamplingInputs) -> tuple[Any, ...]:
    seen, generated = ([_packed(tokens.tobytes()) for tokens in each] for each in (draw.seen, draw.generated))
    masks = ()  # whoever has the vocabulary makes them again
    return draw.samplings, draw.positions.tolist(), seen, draw.is_guess, generated, masks, draw.given


_FORMS: dict[type, Callable[[Any], Any]] = {kind: _named(kind) for kind in (*get_args(Event), *get_args(Command))}
_FORMS |= {kind: _all_fields(kind) for kind in (Request, Sampling, RequestStats)}
_FORMS |= {Batch: _batch_form, SamplingInputs: _draw_form}
_ENCODER = json.JSONEncoder(separators=(",", ":"), check_circular=False, default=_form)


class TraceWriter:
    """Writes the trace of one rank to ``FILE.rankN``; ``write`` is an executor's Observer.

    Raises UserError where the file cannot be made. If writing fails later, it says so once, on standard error, and the
    trace ends there."""

    def __init__(self, name: str, header: Header) -> None:
        self.path = rank_file(name, header.rank)
        try:
            self._file = open(self.path, "wb", buffering=0)  # noqa: SIM115  closed by close
        except (OSError, ValueError) as error:
            _refuse_to_write(self.path, error)
        try:
            self._put({MARK: FORMAT, **asdict(header)})
        except OSError as error:
            self.close()
            _refuse_to_write(self.path, error)

    def write(self, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """The role at ``address`` has answered ``event`` at ``now`` with ``commands``."""
        if self._file.closed:
            return
        try:
            self._put((now, address, event, commands))
        except OSError as error:
            self.close()
            print(f"pipeinfer: the trace {self.path} ends here ({error.strerror})", file=sys.stderr, flush=True)

    def _put(self, words: Any) -> None:
        line = _ENCODER.encode(words).encode() + b"\n"
        while line:  # a disk that is nearly full takes a part
            line = line[self._file.write(line) :]

    def close(self) -> None:
        """Let the file go."""
        self._file.close()


def rank_file(name: str, rank: int) -> Path:
    """Where ``rank`` of a job with ``trace = name`` writes."""
    return Path(f"{name}.rank{rank}")


def refuse_unwritable(name: str, ranks: int) -> None:
    """Raise UserError if ``ranks`` ranks on this host could not write a trace called ``name``. Leaves no file."""
    if not name or "\0" in name or name.endswith(os.sep) or os.path.isdir(name):
        refuse(f"the trace {name!r} names no file", "name one, such as run.trace")
    for path in [rank_file(name, rank) for rank in range(ranks)]:
        try:
            # What access rights say is not always so (root, read-only and virtual file systems): try.
            with open(path, "ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
                pass
        except (OSError, ValueError) as error:
            _refuse_to_write(path, error)


def _refuse_to_write(path: Path, error: OSError | ValueError) -> NoReturn:
    why = error.strerror if isinstance(error, OSError) else error
    refuse(f"the trace {path} cannot be written ({why})", "name a file in a directory that is writable")


# Reading.


def _maker(kind: type, /, **readers: Callable[[Any], Any]) -> Callable[[list[Any]], Any]:
    """Builds a ``kind`` from its stored fields; ``readers`` are for those that JSON does not give back as they were."""
    names = getattr(kind, "_fields", None) or [member.name for member in fields(kind)]
    places = [(names.index(name), reader) for name, reader in readers.items()]

    def make(stored: list[Any]) -> Any:
        values = list(stored)
        for place, reader in places:
            if place < len(values) and values[place] is not None:
                values[place] = reader(values[place])
        return kind(*values)

    return make


def _message(stored: list[Any]) -> Message:
    kind, source, dest, body, *rest = stored
    layout = _KINDS[kind]
    lists = [items.restore(found) for items, found in zip(layout.lists, body[layout.numbers :], strict=True)]
    return Message(source, dest, layout.make(body[: layout.numbers], lists), *rest)


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text, validate=True))


def _integers(stored: list[int]) -> npt.NDArray[np.int64]:
    return np.array(stored, np.int64)


def _ranges(stored: list[str]) -> tuple[npt.NDArray[np.int64], ...]:
    return tuple(np.frombuffer(_unpacked(packed), np.int64).reshape(-1, 2) for packed in stored)


def _texts(stored: list[str]) -> tuple[npt.NDArray[np.int64], ...]:
    return tuple(np.frombuffer(_unpacked(tokens), np.int64) for tokens in stored)


def _payload(is_there: bool) -> str | None:
    return TENSOR if is_there else None


_KINDS = {layout.kind.__name__: layout for layout in LAYOUTS.values()}
_LOGPS = {"logps": tuple, "tops": lambda stored: tuple(tuple(TopToken(*pair) for pair in pairs) for pairs in stored)}
_SAMPLING = _maker(Sampling, logit_bias=lambda stored: tuple(map(tuple, stored)))
_READERS: dict[type, dict[str, Callable[[Any], Any]]] = {
    Received: {"message": _message, "payload": _payload},
    Computed: {
        "hidden": _payload,
        "choices": lambda stored: [[(token, logp) for token, logp in row] for row in stored],
        "faults": lambda stored: {int(row): layer for row, layer in stored.items()},  # JSON's names are text
    },
    Submitted: {"request": _maker(Request, prompt=tuple, stop_tokens=frozenset, sampling=_SAMPLING)},
    Send: {"message": _message, "payload": _payload},
    Compute: {
        "batch": _maker(
            Batch,
            tokens=_integers,
            positions=_integers,
            slots=_integers,
            canonical=_ranges,
            sequence=_integers,
            prefix=_integers,
            ancestors=_integers,
            ancestor_ends=_integers,
        ),
        "hidden": _payload,
        "keep": tuple,
        "rows": tuple,
        "draw": _maker(
            SamplingInputs,
            samplings=lambda stored: tuple(map(_SAMPLING, stored)),
            positions=_integers,
            seen=_texts,
            generated=_texts,
            masks=tuple,
            given=tuple,
        ),
    },
    Emit: {"tokens": tuple, **_LOGPS},
    Score: _LOGPS,
    Idle: {"stats": _maker(RequestStats)},
}
_EVENTS = {kind.__name__: _maker(kind, **_READERS.get(kind, {})) for kind in get_args(Event)}
_COMMANDS = {kind.__name__: _maker(kind, **_READERS.get(kind, {})) for kind in get_args(Command)}


class Trace:
    """The trace in the file at ``path``. Raises UserError where there is none.

    ``damage``: what ``steps``, when it has ended, could not read; empty if it came to the end of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damage = ""
        fix = "name a file that `pipeinfer run --trace` made"
        try:
            with open(path, "rb") as file:
                first = json.loads(file.readline(MOST_NBYTES))
            if first.pop(MARK) != FORMAT or first["protocol"] != VERSION:
                refuse(f"the trace {path} was made by another version", "replay it with that version")
            self.header = Header(**first)
        except OSError as error:
            refuse(f"the trace {path} cannot be read ({error.strerror})", fix)
        except DAMAGE as error:
            refuse(f"{path} is no trace ({type(error).__name__}: {error})", fix)

    def steps(self) -> Iterator[Step]:
        """Its events, as far as they can be read."""
        self.damage = ""
        with open(self.path, "rb") as file:
            file.readline(MOST_NBYTES)
            for number, line in enumerate(iter(lambda: file.readline(MOST_NBYTES), b""), 2):
                if not line.endswith(b"\n"):
                    self.damage = f"line {number} is cut off"
                    return
                try:
                    step = self._step(json.loads(line))
                except DAMAGE as error:
                    self.damage = f"line {number} is damaged ({type(error).__name__}: {error})"
                    return
                yield step

    def _step(self, words: list[Any]) -> Step:
        now, address, event, commands = words
        if address not in self.header.roles:
            raise ValueError(f"no role {address} plays on this rank")
        return Step(address, _read(_EVENTS, event), float(now), tuple(_read(_COMMANDS, told) for told in commands))


def in_order(traces: Sequence[Trace]) -> Iterator[tuple[float, Step]]:
    """The events of all ``traces`` in the order of time, each with its time in seconds since the first one.

    Ranks of one host share a clock. Those of others are compared by what their hosts took for the time of day."""
    walls: dict[str, float] = {}
    for trace in traces:
        walls.setdefault(trace.header.host, trace.header.wall_s - traces[0].header.wall_s)
    began: float | None = None
    for at, _, step in heapq.merge(*(_dated(trace, walls[trace.header.host]) for trace in traces), key=_date):
        began = at if began is None else began
        yield at - began, step


def _dated(trace: Trace, wall_s: float) -> Iterator[tuple[float, int, Step]]:
    for step in trace.steps():
        yield step.now + wall_s, trace.header.rank, step


def _date(dated: tuple[float, int, Step]) -> tuple[float, int]:
    return dated[:2]


DAMAGE = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, zlib.error)
"""What reading anything but a trace may raise."""


def _read(makers: Mapping[str, Callable[[list[Any]], Any]], stored: list[Any]) -> Any:
    return makers[stored[0]](stored[1:])
