"""A JSON channel over a socket: nothing that has arrived is lost or overlooked, whatever is said in between."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from launch.json_channel import JsonChannel


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, JsonChannel, JsonChannel]]:
    """Two ends of a wire, and the first one's socket."""
    here, there = socket.socketpair()
    with here, there:
        yield here, JsonChannel(here), JsonChannel(there)


Ends = tuple[socket.socket, JsonChannel, JsonChannel]


def test_what_is_said_is_heard(ends: Ends) -> None:
    _, one, other = ends
    one.send({"text": "a\nb\N{SNOWMAN}", "nothing": None})
    other.send({})
    assert other.receive() == {"text": "a\nb\N{SNOWMAN}", "nothing": None}
    assert one.receive() == {}


def test_what_arrived_together_is_heard_even_if_something_is_said_in_between(ends: Ends) -> None:
    """A text file over the socket loses what it has read ahead when it writes: a request's end was lost like that."""
    _, one, other = ends
    for number in range(3):
        one.send({"number": number})
    for number in range(3):
        assert other.is_readable
        assert other.receive() == {"number": number}
        other.send({"heard": number})
    assert not other.is_readable


def test_half_a_line_is_waited_for(ends: Ends) -> None:
    wire, _, other = ends
    wire.sendall(b'{"a": 1}\n{"b"')
    assert other.receive() == {"a": 1}
    assert not other.is_readable
    wire.sendall(b": 2}\n")
    assert other.receive() == {"b": 2}


def test_the_end_is_something_to_hear(ends: Ends) -> None:
    wire, one, other = ends
    one.send({"last": True})
    wire.sendall(b'{"never whole')
    wire.close()
    assert other.receive() == {"last": True}
    assert other.is_readable
    assert other.receive() is None
    with pytest.raises(ConnectionError):
        other.send({})


def test_an_end_that_left_without_listening_is_the_end_too(ends: Ends) -> None:
    wire, _, other = ends
    other.send({"unheard": True})
    wire.close()
    assert other.receive() is None
