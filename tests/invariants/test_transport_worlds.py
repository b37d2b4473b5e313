"""The transport keeps order and contents whatever MPI may do, bare and under the machines; planted faults show it.

``python -m tests.invariants.test_transport_worlds 5000`` looks at so many worlds of each kind.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from launch import transport
from launch.transport import MpiTransport
from pipeinfer.core.errors import PipeinferError, StallError
from pipeinfer.sim.history import InvariantBroken
from tests.invariants.hunt import wrap
from tests.invariants.simulated_mpi import NAMES, Bell, Library, MpiMisuse
from tests.invariants.transport_worlds import check_driven_world, random_traffic
from tests.invariants.virtual_time import VirtualTime

WORLDS: dict[str, Callable[[int], object]] = {
    "traffic": lambda seed: random_traffic(seed).check(),
    "machines": check_driven_world,
}
TRAFFIC, MACHINES = range(40), range(25)
Plant = Callable[[pytest.MonkeyPatch], object]


def failures(kind: str, seeds: range, most: int = 3) -> list[str]:
    """A line for each world that breaks an invariant, by its seed. What no check raises on purpose is not caught."""
    found = list[str]()
    for seed in seeds:
        try:
            WORLDS[kind](seed)
        except (InvariantBroken, PipeinferError, MpiMisuse) as error:
            found.append(f"{kind} {seed}: {type(error).__name__}: {error}")
            if len(found) == most:
                break
    return found


@pytest.mark.parametrize(("kind", "seeds"), [("traffic", TRAFFIC), ("machines", MACHINES)])
def test_every_invariant_holds(kind: str, seeds: range) -> None:
    assert not failures(kind, seeds)


def test_there_are_more_tensors_than_buffers() -> None:
    for seed in range(5):
        traffic = random_traffic(seed)
        assert traffic.check() > 2 * traffic.ranks * (traffic.ranks - 1) * (traffic.each + 1)
    worlds = [check_driven_world(seed) for seed in range(10)]
    assert sum(world.tensors > 3 * (world.window + 1) for world in worlds) > 5


def test_a_seed_is_a_world() -> None:
    first, second = (check_driven_world(3) for _ in range(2))
    assert [answer.stats for answer in first.answers] == [answer.stats for answer in second.answers]


@pytest.mark.parametrize(("hosts", "most"), [((0, 0), 60), ((0, 1), 11_000)], ids=["one host", "two hosts"])
def test_a_quiet_transport_looks_up_rarely(hosts: tuple[int, ...], most: int) -> None:
    """How often each of two ranks wakes in a second: where both hear the bell hardly ever, else each 100 us."""
    time, bells, woken = VirtualTime(), dict[bytes, Bell](), [0, 0]
    library = Library(time, random.Random(1), hosts)

    def wait(rank: int) -> None:
        quiet = MpiTransport(*library.worlds(rank), bytes, bytes, 1, NAMES, Bell(library, rank, bells), time)
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            assert not quiet.poll()
            quiet.wait(50e-3)
            woken[rank] += 1
        quiet.close()

    time.run([lambda: wait(0), lambda: wait(1)])
    assert max(woken) < most


def one_staging_buffer(patch: pytest.MonkeyPatch) -> None:
    """What is sent is copied to a buffer that the next send uses again."""

    def build(original: Any, self: Any, comm: Any, node: Any, pack: Any, *more: Any) -> None:
        stage = np.empty(1 << 20, np.uint8)

        def staged(payload: Any) -> Any:
            packed = pack(payload)
            stage[: packed.nbytes] = packed
            return stage[: packed.nbytes]

        original(self, comm, node, staged, *more)

    wrap(patch, MpiTransport, "__init__", build)


def a_rotation_one_smaller_than_the_window(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, transport._Rotation, "__init__", lambda original, self, window: original(self, max(0, window - 2)))


def senders_share_a_rotation(patch: pytest.MonkeyPatch) -> None:
    class Shared(dict):  # type: ignore[type-arg]
        def __contains__(self, source: object) -> bool:
            return bool(len(self))

        def __getitem__(self, source: int) -> Any:
            return next(iter(self.values()))

    def build(original: Any, self: Any, *more: Any) -> None:
        original(self, *more)
        self._rotations = Shared()

    wrap(patch, MpiTransport, "__init__", build)


def a_tensor_from_whoever_sends_first(patch: pytest.MonkeyPatch) -> None:
    def expect(original: Any, self: Any, source: int, *more: Any) -> Any:
        return original(self, NAMES.ANY_SOURCE, *more)

    wrap(patch, MpiTransport, "_expect", expect)


def a_message_that_does_not_wait_for_its_tensor(patch: pytest.MonkeyPatch) -> None:
    def expect(original: Any, *words: Any) -> Any:
        inbound = original(*words)
        inbound.request = None
        return inbound

    wrap(patch, MpiTransport, "_expect", expect)


def what_rides_with_a_message_is_not_copied(patch: pytest.MonkeyPatch) -> None:
    class Uncopied(np.ndarray):  # type: ignore[type-arg]
        def copy(self, order: Any = "C") -> Any:
            return self.view(np.ndarray)

    def from_buffer(*words: Any) -> Any:
        return np.frombuffer(*words).view(Uncopied)

    patch.setattr(transport, "np", SimpleNamespace(empty=np.empty, uint8=np.uint8, frombuffer=from_buffer))


def the_ring_is_taken_as_it_fills(patch: pytest.MonkeyPatch) -> None:
    def take(original: Any, self: Any) -> Any:
        if (taken := original(self)) is None:
            self._next = (self._next + 1) % transport.RING
        return taken

    wrap(patch, transport._Ring, "take", take)


def the_ring_stays_posted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(transport._Ring, "close", lambda self: None)


@pytest.mark.parametrize(
    ("plant", "kind", "caught_by"),
    [
        (one_staging_buffer, "traffic", "L7"),
        (one_staging_buffer, "machines", "L7"),
        (a_rotation_one_smaller_than_the_window, "traffic", "L7"),
        (a_rotation_one_smaller_than_the_window, "machines", "L7"),
        (senders_share_a_rotation, "traffic", "L7"),
        (a_tensor_from_whoever_sends_first, "traffic", "L7"),
        (a_message_that_does_not_wait_for_its_tensor, "traffic", "L7"),
        (a_message_that_does_not_wait_for_its_tensor, "machines", "L7"),
        (what_rides_with_a_message_is_not_copied, "traffic", "L7"),
        (what_rides_with_a_message_is_not_copied, "machines", "L7"),
        (the_ring_is_taken_as_it_fills, "traffic", "L4"),
        (the_ring_is_taken_as_it_fills, "machines", "L4"),
        (the_ring_stays_posted, "machines", "MpiMisuse"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_fault_is_caught(plant: Plant, kind: str, caught_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    seeds = range(200) if kind == "traffic" else range(60)
    found = list[str]()
    for start in range(0, len(seeds), 10):
        found += failures(kind, seeds[start : start + 10])
        if any(f": {caught_by}:" in line for line in found):
            return
    pytest.fail(f"not caught by {caught_by} in {len(seeds)} worlds, but {found[:5]}")


def test_ranks_that_wait_for_each_other_are_a_stall() -> None:
    library = Library(VirtualTime(most_turns=1000), random.Random(0), (0, 0))

    def wait(rank: int) -> None:
        library.worlds(rank)[0].Irecv([bytearray(1), NAMES.BYTE], 1 - rank).Wait()

    with pytest.raises(StallError, match="1000 turns"):
        library.time.run([lambda: wait(0), lambda: wait(1)])


def main() -> int:
    worlds = range(int(sys.argv[1]))
    found = [line for kind in WORLDS for line in failures(kind, worlds)]
    print("\n".join(found) or f"{len(worlds)} worlds of each kind kept every invariant")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
