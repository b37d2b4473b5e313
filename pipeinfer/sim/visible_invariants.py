"""L3, what a row attends to: the slots of its own path and no other, those of another sequence least of all.

The hash chain of the emulated model changes a token, too, if a wrong slot holds something else; here the slot is named.
Only worlds with many sequences are looked at, so that planted faults in others show that the chain notices.
"""

from __future__ import annotations

from pipeinfer.core.addresses import FIRST_STAGE, address_name
from pipeinfer.core.ports import Command, Compute, Event
from pipeinfer.core.slots import attended
from pipeinfer.sim.history import History, InvariantBroken, Launched, Reader, Written
from pipeinfer.sim.world import World

STRIDE = 4
"""One pass in so many is looked at; of a run with rows of several sequences every one."""


class Visible(Reader):
    """L3 for the rows of every stage's passes."""

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self._count = 0

    def on_event(self, world: World, address: int, event: Event, now: float, commands: list[Command]) -> None:
        """See Checker."""
        if not FIRST_STAGE <= address < FIRST_STAGE + world.spec.stages:
            return
        for command in commands:
            launched = self.history.runs.get(command.job) if isinstance(command, Compute) else None
            if launched is None or not isinstance(command, Compute):
                continue
            self._count += 1
            if len(launched.records) > 1 or self._count % STRIDE == 0:
                self._look(command, launched, address_name(address))

    def _look(self, compute: Compute, launched: Launched, who: str) -> None:
        for row, slot in enumerate(compute.batch.slots.tolist()):
            written, seen = launched.written[slot], attended(compute.batch, row).tolist()
            if not self._is_path(seen, written):
                what = f"{who}: token {written.token} at {written.position} of sequence {written.record.sequence}"
                raise InvariantBroken(f"L3: {what}, in run {launched.run.run}, attends to the slots {seen}")

    def _is_path(self, seen: list[int], written: Written) -> bool:
        """Whether ``seen`` are the slots from the text's first token to ``written``. Where tokens are sent twice,
        another slot may hold the same."""
        if len(seen) != written.position + 1 or seen[-1] != written.slot:
            return False
        one: Written | None = written
        for slot in reversed(seen):
            if one is None or not (slot == one.slot or self._holds_the_same(slot, one)):
                return False
            one = one.parent
        return one is None

    def _holds_the_same(self, slot: int, written: Written) -> bool:
        other = written.record.at.get(slot)
        if other is None or not self.history.may_repeat:
            return False
        return (other.token, other.position) == (written.token, written.position)
