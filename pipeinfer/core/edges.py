"""The transaction numbers of one role: stamped on what it sends, checked on what it receives (invariant L4)."""

from __future__ import annotations

from pipeinfer.core.addresses import address_name
from pipeinfer.core.errors import RemoteProtocolError
from pipeinfer.core.messages import Body, Message


class Edges:
    """The edges of the role at ``address``."""

    def __init__(self, address: int) -> None:
        self.address = address
        self._sent: dict[int, int] = {}
        self._seen: dict[int, int] = {}

    def message(self, dest: int, body: Body) -> Message:
        """``body`` to ``dest`` as the next ordered message of its edge."""
        txn = self._sent[dest] = self._sent.get(dest, 0) + 1
        return Message(self.address, dest, body, txn)

    def check(self, message: Message) -> None:
        """Raise RemoteProtocolError unless ``message`` is the next one of its edge."""
        if message.is_control:
            return
        expected = self._seen.get(message.source, 0) + 1
        if message.txn != expected:
            raise RemoteProtocolError(
                f"{address_name(self.address)} expected transaction {expected} from {address_name(message.source)}, "
                f"got {message.txn} ({message.kind})"
            )
        self._seen[message.source] = expected

    @property
    def taken(self) -> int:
        """How many ordered messages this role has taken."""
        return sum(self._seen.values())
