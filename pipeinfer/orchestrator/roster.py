"""The roles that the orchestrator leads: who is ready, and what each one answers when nothing moves."""

from __future__ import annotations

from pipeinfer.core.addresses import ORCHESTRATOR, address_name, drafter_address, stage_address
from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.messages import Message, Probe, Status
from pipeinfer.core.ports import Send


class Roster:
    """``stages`` stages and ``drafters`` drafters, by address. ``digest``: of the configuration that all must have."""

    def __init__(self, stages: int, drafters: int, digest: int) -> None:
        self.stages = [stage_address(index) for index in range(stages)]
        self.drafters = [drafter_address(index) for index in range(drafters)]
        self.awaited = {*self.stages, *self.drafters}  # their Hello has not arrived yet
        self._digest = digest
        self._answers: dict[int, Status] = {}

    @property
    def everybody(self) -> list[int]:
        """All addresses, stages first."""
        return self.stages + self.drafters

    def hello(self, source: int, digest: int) -> None:
        """Take a Hello. Raises RemoteProtocolError if the sender has another configuration."""
        if digest != self._digest:
            who = address_name(source)
            raise RemoteProtocolError(f"{who} runs another configuration ({digest:#x}, here {self._digest:#x})")
        self.awaited.discard(source)

    def probe(self) -> list[Send]:
        """Ask everybody what they are doing; earlier answers are forgotten."""
        self._answers.clear()
        return [Send(Message(ORCHESTRATOR, dest, Probe())) for dest in self.everybody]

    def answered(self, source: int, status: Status) -> None:
        """Take a Status."""
        self._answers[source] = status

    @property
    def is_heard(self) -> bool:
        """Whether everybody has answered the last probe."""
        return len(self._answers) == len(self.everybody)

    @property
    def is_busy(self) -> bool:
        """Whether somebody was computing when it answered."""
        return any(answer.is_busy for answer in self._answers.values())

    def waiting_for(self) -> str:
        """Whose Hello is missing, as text; empty if none is."""
        names = ", ".join(address_name(address) for address in sorted(self.awaited))
        return f"waiting for Hello from {names}" if names else ""

    def report(self) -> list[str]:
        """What each role answered to the last probe, one line each; the silent ones are named too."""
        lines = []
        for address in self.everybody:
            answer = self._answers.get(address)
            state = (
                f"run {answer.run}, {answer.waiting} waiting, {answer.taken} messages taken" if answer else "no answer"
            )
            busy = ", computing" if answer and answer.is_busy else ""
            lines.append(f"{address_name(address)}: {state}{busy}")
        return lines
