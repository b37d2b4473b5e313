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
    one.say({"text": "a\nb\N{SNOWMAN}", "nothing": None})
    other.say({})
    assert other.hear() == {"text": "a\nb\N{SNOWMAN}", "nothing": None}
    assert one.hear() == {}


def test_what_arrived_together_is_heard_even_if_something_is_said_in_between(ends: Ends) -> None:
    """A text file over the socket loses what it has read ahead when it writes: a request's end was lost like that."""
    _, one, other = ends
    for number in range(3):
        one.say({"number": number})
    for number in range(3):
        assert other.is_spoken_to
        assert other.hear() == {"number": number}
        other.say({"heard": number})
    assert not other.is_spoken_to


def test_half_a_line_is_waited_for(ends: Ends) -> None:
    wire, _, other = ends
    wire.sendall(b'{"a": 1}\n{"b"')
    assert other.hear() == {"a": 1}
    assert not other.is_spoken_to
    wire.sendall(b": 2}\n")
    assert other.hear() == {"b": 2}


def test_the_end_is_something_to_hear(ends: Ends) -> None:
    wire, one, other = ends
    one.say({"last": True})
    wire.sendall(b'{"never whole')
    wire.close()
    assert other.hear() == {"last": True}
    assert other.is_spoken_to
    assert other.hear() is None
    with pytest.raises(ConnectionError):
        other.say({})


def test_an_end_that_left_without_listening_is_the_end_too(ends: Ends) -> None:
    wire, _, other = ends
    other.say({"unheard": True})
    wire.close()
    assert other.hear() is None
