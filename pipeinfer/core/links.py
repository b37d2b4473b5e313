"""Links: what a message takes from one host to another. One description serves the simulator and paced MPI jobs."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeinfer.core.messages import Message
from pipeinfer.core.ports import Payload
from pipeinfer.core.wire import wire_nbytes


@dataclass(frozen=True, slots=True)
class Link:
    """Every pair of hosts has one. Times in seconds, bandwidth in bytes per second; probabilities per control
    message. ``row_nbytes``: bytes of a row's activations, where those of the payload are not meant (0: they are)."""

    delay_s: float = 1e-5
    jitter_s: float = 0.0
    bandwidth: float = 1e9
    control_loss: float = 0.0
    control_repeat: float = 0.0
    row_nbytes: int = 0

    def nbytes(self, message: Message, payload: Payload | None) -> int:
        """How large ``message`` is on the wire, with its ``payload``."""
        return wire_nbytes(message) + self.payload_nbytes(message, payload)

    def payload_nbytes(self, message: Message, payload: Payload | None) -> int:
        """How large the ``payload`` of ``message`` is on the wire."""
        return 0 if payload is None else self.row_nbytes * message.payload_rows or int(payload.nbytes)


@dataclass(slots=True)
class Wires:
    """When the wires of a ``link`` between pairs of hosts are free: what is sent at once leaves one after the other."""

    link: Link
    _free_at: dict[tuple[int, int], float] = field(default_factory=dict)

    def arrival(self, source: int, dest: int, nbytes: int, now: float) -> float:
        """When ``nbytes`` that host ``source`` sends now reach ``dest``."""
        left = max(now, self._free_at.get((source, dest), 0.0)) + nbytes / self.link.bandwidth
        self._free_at[source, dest] = left
        return left + self.link.delay_s
