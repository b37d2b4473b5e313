"""Reports: the rows of a suite as a table or as JSON, and in a file that is complete after every row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeinfer.bench.fingerprint import fingerprint
from pipeinfer.bench.rows import BANNERS, axes_of, heading, line
from pipeinfer.bench.suite import Suite
from pipeinfer.core.errors import refuse
from pipeinfer.core.files import write_whole


class Report:
    """Says on standard output what ``suite`` found: a table, or one JSON object a line (``as_json``). ``directory``
    gets the rows as <suite>.<execution>.jsonl."""

    def __init__(self, suite: Suite, as_json: bool, directory: str | None) -> None:
        self._as_json = as_json
        self._axes = axes_of(suite.points)
        self._rows: list[dict[str, Any]] = []
        self._is_real = suite.execution == "real"
        self._announced = ""
        self._has_heading = False
        self._path = None
        if directory is not None:
            self._path = Path(directory) / f"{suite.name}.{suite.execution}.jsonl"
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                refuse(f"{directory} cannot be made ({error.strerror})", "name another directory with --out")
            self._write()
        minutes = suite.minutes.get(suite.execution)
        self.say(f"pipeinfer bench {suite.name}: {suite.title}")
        self.say(BANNERS[suite.execution])
        self.say(
            f"{len(suite.points)} points, {len(suite.policies)} policies, {suite.repeats} repeats"
            + (f"; expect {minutes:g} min on two cores" if minutes else "")
        )
        machine = fingerprint({}, "")
        self.say(f"{machine['cpu']}, {machine['cores']} cores; pipeinfer {machine['pipeinfer']} {machine['git']}")

    def say(self, text: str) -> None:
        """A comment; nothing where JSON is wanted."""
        if not self._as_json:
            print(f"# {text}", flush=True)

    def announce(self, ceiling: float, ideal: float | None = None) -> None:
        """What is allowed at the next point, in tokens per second: ``ceiling`` by the machine or its description, to
        plain decoding; ``ideal`` by the drafts. Said before anything is measured there, unless the last point had it
        too."""
        if not self._has_heading and not self._as_json:
            print(heading(self._axes), flush=True)
            self._has_heading = True
        why = "its weights are read once a token" if self._is_real else "a token is a trip through the stages"
        text = f"plain decoding: at most {ceiling:.4g} tokens/s, {why}"
        text += f"; ideal speculation: {ideal:.4g}" if ideal else ""
        if text != self._announced:
            self._announced = text
            self.say(text)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """The rows of a further point."""
        self._rows += rows
        for row in rows:
            print(json.dumps(row) if self._as_json else line(row, self._axes), flush=True)
        self._write()

    def explain(self, rows: list[dict[str, Any]]) -> None:
        """What the table cannot say of a real point: where a peer's tokens part from ours, and how long passes take."""
        for row in rows:
            if row["peer"]:
                more = "".join(f"; {key} {value}" for key, value in row["peer"].items() if key != "library")
                share = f"{row['equal_prefix']:.2f} of a text before the first token that is not ours"
                self.say(f"{row['policy']}: {row['peer']['library']}{more}; {share}")
        if rows and rows[0]["passes"]:
            from pipeinfer.bench.pair_passes import lines

            for text in lines(rows[0]["passes"]):
                self.say(text)

    def _write(self) -> None:
        if self._path is not None:
            write_whole(self._path, "".join(json.dumps(row) + "\n" for row in self._rows))
