"""Virtual time for blocking programs: each runs in a thread of its own, one at a time, and sleeping lets another run.

So what sleeps and polls, as ranks do, is run as it is, is decided by the order of the agenda alone, and takes no time.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Sequence

from pipeinfer.core.errors import StallError

MOST_TURNS = 400_000
"""So often somebody may wake in one world; a world that needs more does not end."""


class Stopped(BaseException):
    """Another program has failed, and this one ends."""


class _Program:
    def __init__(self) -> None:
        self.turn = threading.Semaphore(0)
        self.ticket = 0  # what would wake it now; all older tickets are void


class VirtualTime:
    """A clock for the programs that it runs, and an agenda of actions; a Clock of launch/backoff.py."""

    def __init__(self, most_turns: int = MOST_TURNS) -> None:
        self._most_turns = most_turns
        self._now = 0.0
        self._serial = self._turns = 0
        self._agenda: list[tuple[float, int, Callable[[], object] | None, _Program | None, int]] = []
        self._programs: list[_Program] = []
        self._running: _Program | None = None
        self._left = 0
        self._failure: BaseException | None = None
        self._over = threading.Semaphore(0)

    def monotonic(self) -> float:
        """Seconds since the beginning."""
        return self._now

    def at(self, when: float, action: Callable[[], object]) -> None:
        """Have ``action`` called then, by whoever is awake; it must not sleep."""
        self._push(when, action, None, 0)

    def rest(self, seconds: float) -> None:
        """Let the others run for so long, or until the running program is woken."""
        me = self._running
        assert me is not None, "only programs sleep"
        me.ticket += 1
        self._push(self._now + max(0.0, seconds), None, me, me.ticket)
        self._pass_on(me)

    sleep = rest  # as launch/backoff.py calls it

    def wake(self, index: int) -> None:
        """End the sleep of that program, if it sleeps."""
        program = self._programs[index]
        if program is not self._running:
            self._push(self._now, None, program, program.ticket)

    def run(self, programs: Sequence[Callable[[], object]]) -> None:
        """Run ``programs`` to their end; raises what the first of them raised to fail, or StallError where nothing is
        left that could wake anybody."""
        self._programs = [_Program() for _ in programs]
        self._left = len(programs)
        threads = [
            threading.Thread(target=self._live, args=(mine, body), daemon=True)
            for mine, body in zip(self._programs, programs, strict=True)
        ]
        for thread, program in zip(threads, self._programs, strict=True):
            self._push(0.0, None, program, 0)
            thread.start()
        self._pass_on(None)
        self._over.acquire()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure

    def _push(self, when: float, action: Callable[[], object] | None, program: _Program | None, ticket: int) -> None:
        self._serial += 1
        heapq.heappush(self._agenda, (when, self._serial, action, program, ticket))

    def _live(self, mine: _Program, body: Callable[[], object]) -> None:
        mine.turn.acquire()
        if self._failure is None:
            try:
                body()
            except Stopped:
                pass
            except BaseException as error:
                self._fail(error)
        self._left -= 1
        if not self._left:
            self._over.release()
        elif self._failure is None:
            self._pass_on(None)

    def _fail(self, error: BaseException) -> None:
        """Let everybody end; they do so one by one or at once, nobody waits for anybody."""
        self._failure = self._failure or error
        for program in self._programs:
            program.turn.release()

    def _pass_on(self, me: _Program | None) -> None:
        """Do what is due until it is somebody's turn; return when it is ``me`` (None: at once)."""
        self._running = None
        try:
            following = self._next()
        except BaseException as error:
            self._fail(error)
            if me is None:
                return
            raise Stopped from None
        self._running = following
        if following is me:
            return
        following.turn.release()
        if me is not None:
            me.turn.acquire()
            if self._failure is not None:
                raise Stopped

    def _next(self) -> _Program:
        while self._agenda:
            self._now, _, action, program, ticket = heapq.heappop(self._agenda)
            if action is not None:
                action()
            elif program is not None and program.ticket == ticket:
                program.ticket += 1
                self._turns += 1
                if self._turns == self._most_turns:
                    break
                return program
        raise StallError(f"after {self._turns} turns nobody is left to wake")
