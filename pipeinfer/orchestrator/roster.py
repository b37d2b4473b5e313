"""The roles that the orchestrator leads: who is ready, and what each one answers when nothing moves."""

from __future__ import annotations

from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.ports import Send
from pipeinfer.core.protocol import ORCHESTRATOR, Flag, Kind, Message, address_name, drafter_address, stage_address


class Roster:
    """``stages`` stages and ``drafters`` drafters, by address. ``digest``: of the configuration that all must have."""

    def __init__(self, stages: int, drafters: int, digest: int) -> None:
        self.stages = [stage_address(index) for index in range(stages)]
        self.drafters = [drafter_address(index) for index in range(drafters)]
        self.awaited = {*self.stages, *self.drafters}  # they have not said HELLO yet
        self._digest = digest
        self._answers: dict[int, Message] = {}

    @property
    def everybody(self) -> list[int]:
        """All addresses, stages first."""
        return self.stages + self.drafters

    def hello(self, message: Message) -> None:
        """Take a HELLO. Raises RemoteProtocolError if the sender has another configuration."""
        if message.run != self._digest:
            who = address_name(message.source)
            raise RemoteProtocolError(f"{who} runs another configuration ({message.run:#x}, here {self._digest:#x})")
        self.awaited.discard(message.source)

    def probe(self) -> list[Send]:
        """Ask everybody what they are doing; earlier answers are forgotten."""
        self._answers.clear()
        return [Send(Message(Kind.PROBE, ORCHESTRATOR, dest)) for dest in self.everybody]

    def answered(self, message: Message) -> None:
        """Take a STATUS."""
        self._answers[message.source] = message

    @property
    def is_heard(self) -> bool:
        """Whether everybody has answered the last probe."""
        return len(self._answers) == len(self.everybody)

    @property
    def is_busy(self) -> bool:
        """Whether somebody was computing when it answered."""
        return any(Flag.BUSY in answer.flags for answer in self._answers.values())

    def waiting_for(self) -> str:
        """Whose HELLO is missing, in words; empty if nobody's is."""
        names = ", ".join(address_name(address) for address in sorted(self.awaited))
        return f"waiting for HELLO from {names}" if names else ""

    def report(self) -> list[str]:
        """What each role answered to the last probe, one line each; the silent ones are named too."""
        lines = []
        for address in self.everybody:
            answer = self._answers.get(address)
            said = f"run {answer.run}, {answer.epoch} waiting, {answer.txn} messages taken" if answer else "no answer"
            busy = ", computing" if answer and Flag.BUSY in answer.flags else ""
            lines.append(f"{address_name(address)}: {said}{busy}")
        return lines
