"""Makes runs: which rows leave together, and in which slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter

from kvbuffers.slot_allocator import SlotAllocator
from pipeinfer.core.messages import Result, Row, Run, Wants
from pipeinfer.orchestrator.flight import Flight, InFlight
from pipeinfer.orchestrator.session import Session
from speculation.schedules.prefill_chunks import PrefillChunks
from speculation.schedules.schedule import Launch


class Launcher:
    """Makes runs of sessions, with slots of ``allocator``, and notes them in ``flight``. ``chunks`` says how long runs
    of prompts are."""

    def __init__(self, allocator: SlotAllocator, flight: Flight, chunks: PrefillChunks) -> None:
        self._allocator = allocator
        self._flight = flight
        self._chunks = chunks

    def returned(self, run: InFlight, result: Result) -> None:
        """``run`` is back with ``result``."""
        if result.is_tombstone or run.cancelled_at is not None:
            return
        if run.is_prefill:
            self._chunks.prefilled(sum(map(len, run.prompts.values())), 1e-6 * result.slowest_us)
        else:
            self._chunks.decoded(1e-6 * result.slowest_us)

    def prompts(
        self, waiting: Sequence[Session], now: float, reserve: int = 0, is_decoding: bool = False
    ) -> Run | None:
        """The next chunk of the first prompt, or its end and the ends of others that fit; None if there is no slot.
        ``reserve`` slots stay free, one for each unsent root. ``is_decoding``: whether other sessions decode."""
        longest = self._chunks.rows(sum(session.prompt - session.shared for session in waiting), is_decoding)
        most = room = min(longest, self._allocator.free_slots() - reserve)
        if most <= 0:
            return None
        chosen = list[Session]()
        for session in waiting:
            if session.prompt - session.prefilled <= room:
                chosen.append(session)
                room -= session.prompt - session.prefilled
        ends = waiting[0] in chosen
        if not ends:
            chosen = [waiting[0]]
        ops, rows, prompts = self._allocator.operations(), list[Row](), dict[int, list[int]]()
        for session in chosen:
            chunk = session.text[session.prefilled : session.prompt][:most]
            more, mine = self._allocator.prompt_rows(session.sequence, chunk)
            ops += more
            rows += mine
            prompts[session.sequence] = [row.slot for row in mine]
            session.prefilled += len(mine)
            session.stats.prefill_runs += 1
            if ends:
                session.tree.root.slot = mine[-1].slot
        run = self._flight.launch(chosen, [one.tree.root for one in chosen if ends], [], now)
        run.prompts, run.is_prefill = prompts, True
        wants = Wants.LAST if ends else Wants.NOTHING
        return Run(run.number, is_canonical=True, wants=wants, ops=ops, rows=tuple(rows))

    def nodes(self, launch: Launch, served: Mapping[int, Session], now: float) -> Run:
        """The nodes of ``launch``. ``served``: the sessions by sequence."""
        ops, rows = self._allocator.operations(), list[Row]()
        sessions = {node.sequence: served[node.sequence] for node in (*launch.nodes, *launch.copies)}
        run = self._flight.launch(list(sessions.values()), launch.nodes, launch.copies, now)
        run.is_canonical = launch.is_canonical
        for node in launch.nodes:
            (node.slot,) = self._allocator.lease(node.sequence, 1)
            rows.append(node.row(node.slot))
            session = sessions[node.sequence]
            if node is session.tree.root:
                run.carries_root = True
                self._allocator.commit(node.sequence, node.slot)  # it is accepted already
            else:
                session.stats.drafted += 1
        for node in launch.copies:
            (slot,) = self._allocator.lease(node.sequence, 1)
            rows.append(node.row(slot))
            self._allocator.release(node.sequence, slot)  # nobody will ever look at a copy
        for session in sessions.values():
            session.stats.runs += 1
        for row in rows:
            sessions[row.sequence].stats.rows += 1
        run.rows = len(rows)
        return Run(run.number, ops=ops, rows=tuple(sorted(rows, key=attrgetter("sequence", "position"))))
