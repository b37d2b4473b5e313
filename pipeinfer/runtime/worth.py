"""Which rows of which runs were worth their computation, from what the orchestrator sends and emits.

A row is worth something if its token, after just those tokens before it, stands in the answer of its request. A commit
names the slot of an accepted row. Rows that were in flight when their sequence ended are compared with the answer
itself. Of several rows that say the same only one counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeinfer.core.messages import Row, Run, SlotOpKind


@dataclass(slots=True)
class _Undecided:
    """A sequence that is being decoded: ``rows`` in flight by slot, in the order of launching, each with its run; its
    ``text``; and the positions of it that have their row (``covered``)."""

    text: list[int]
    rows: dict[int, tuple[int, Row]] = field(default_factory=dict)
    covered: set[int] = field(default_factory=set)


class Worth:
    """``accepted``: run and slot of each accepted row. ``prefills``: runs of prompts. ``owners``: by run and slot, the
    sequence of each row that was launched."""

    def __init__(self) -> None:
        self.accepted: set[tuple[int, int]] = set()
        self.prefills: set[int] = set()
        self.owners: dict[tuple[int, int], int] = {}
        self._sequences: defaultdict[int, _Undecided] = defaultdict(lambda: _Undecided([]))

    def begin(self, sequence: int, text: Sequence[int]) -> None:
        """``sequence`` begins with ``text``, its prompt."""
        self._sequences[sequence] = _Undecided(list(text))

    def launch(self, run: Run) -> None:
        """A run leaves: operations on slots first, then its rows."""
        for op in run.ops:
            if op.kind not in (SlotOpKind.COMMIT, SlotOpKind.RELEASE) or op.sequence not in self._sequences:
                continue
            one = self._sequences[op.sequence]
            for slot in range(op.slot, op.slot + op.length):
                launched = one.rows.pop(slot, None)
                if launched and op.kind is SlotOpKind.COMMIT:
                    self._accept(one, *launched)
        self.owners.update(((run.run, row.slot), row.sequence) for row in run.rows)
        if run.is_canonical:
            self.prefills.add(run.run)
            return
        for row in run.rows:
            self._sequences[row.sequence].rows[row.slot] = run.run, row

    def emit(self, sequence: int, tokens: Sequence[int]) -> None:
        """The next tokens of the answer."""
        self._sequences[sequence].text += tokens

    def settle(self, sequence: int) -> None:
        """No run will tell any more of ``sequence``: what was in flight is compared with the answer."""
        one = self._sequences.pop(sequence, None)
        if one is None:
            return
        for run, row in one.rows.values():
            parent = one.rows.get(row.parent)
            follows = parent is None or (parent[0], row.parent) in self.accepted
            is_right = one.text[row.position : row.position + 1] == [row.token]
            if follows and is_right and row.position not in one.covered:
                self._accept(one, run, row)

    def settle_all(self) -> None:
        """The trace has ended."""
        for sequence in list(self._sequences):
            self.settle(sequence)

    def _accept(self, one: _Undecided, run: int, row: Row) -> None:
        self.accepted.add((run, row.slot))
        one.covered.add(row.position)
