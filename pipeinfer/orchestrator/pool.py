"""The pool of slots of all sequences: who gets some, what is kept for later requests, and what goes when none is left.

A sequence that has ended well stays in the pool, and a request that begins with the same tokens shares its slots
instead of computing them again (prefix caching as in vLLM and SGLang, but by sequences; tokens are compared, never
hashes). Sequences that are being decoded lend their prefixes, too. What is kept goes first when slots run out, the
least recently used sequence before others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvbuffers.slot_allocator import SlotAllocator
from pipeinfer.core.messages import MAX_KEPT
from pipeinfer.orchestrator.session import Session
from speculation.trees.forest import pending_roots
from speculation.trees.tree import Tree

LEAST_SHARED = 16
"""A shorter common prefix is not worth an operation."""


class Pool:
    """``allocator`` and the sequences that are kept in it; none with ``keeps`` False."""

    def __init__(self, allocator: SlotAllocator, keeps: bool) -> None:
        self.allocator = allocator
        self._keeps = keeps
        self._kept: dict[int, list[int]] = {}  # sequence -> tokens in its canonical slots, least recently used first

    def begin(self, session: Session, sequence: int, active: Iterable[Session]) -> int | None:
        """Begin the slots of ``sequence``, which ``session`` is about to become, beside the ``active`` ones: how many
        tokens it shares with another sequence, or None if its prompt finds no slots now. Each active session may still
        want slots for the rest of its prompt and for its next token. Where log-probabilities of the prompt are wanted,
        nothing is shared: all rows must be computed (as in vLLM)."""
        active = list(active)
        owed = sum(one.prompt - one.prefilled + 1 for one in active)
        needed = owed + len(session.text) + (session.left > 0)
        source, length = self._match(session.text, active) if self._keeps and not session.wants_scores else (0, 0)
        if not self._finds(needed - length, but=source):
            source, length = 0, 0
            if not self._finds(needed, but=0):
                return None
        if length:
            self.allocator.fork(sequence, source, length)
            if source in self._kept:
                self._kept[source] = self._kept.pop(source)  # the most recently used one now
        return length

    def usage(self, active: Iterable[Session]) -> float:
        """The share of the slots that guesses and the tokens of ``active`` sessions have. What is kept is not counted,
        shared or not: most of it goes as soon as slots are wanted."""
        allocator = self.allocator
        tokens = sum(max(0, allocator.length(one.sequence) - one.shared) for one in active)
        return (tokens + allocator.leased) / allocator.capacity

    def secure(self, trees: Iterable[Tree], prompts: Iterable[Session]) -> None:
        """Let kept sequences go where known tokens, the roots of ``trees`` or the rest of ``prompts``, or guesses would
        find no slot."""
        if self._kept:
            allocator = self.allocator
            known = pending_roots(trees) + sum(one.prompt - one.prefilled for one in prompts)
            self._clear(known + allocator.speculative - allocator.leased, but=0)

    def _finds(self, count: int, but: int) -> bool:
        """Whether ``count`` slots can be leased, if need be after kept sequences, ``but`` not, have gone. None goes
        where all of them would not be enough."""
        held = sum(len(tokens) for sequence, tokens in self._kept.items() if sequence != but)
        return count <= self.allocator.free_slots() + held and self._clear(count, but)

    def _clear(self, count: int, but: int) -> bool:
        """Free kept sequences, ``but`` not, until ``count`` slots can be leased; whether they can."""
        allocator = self.allocator
        free = allocator.free_slots()
        for sequence in [kept for kept in self._kept if kept != but] if free < count else ():
            del self._kept[sequence]
            allocator.free(sequence)
            if (free := allocator.free_slots()) >= count:
                break
        return free >= count

    def _match(self, text: Sequence[int], active: Iterable[Session]) -> tuple[int, int]:
        """The sequence that begins like ``text`` for longest, and for how many tokens; the last token is not among
        them, as the target's choice after it is wanted."""
        best, longest = 0, LEAST_SHARED - 1
        live = ((one.sequence, self._verified(one)) for one in active if one.has_result)
        for sequence, tokens in (*self._kept.items(), *live):
            most = min(len(tokens), len(text) - 1, MAX_KEPT)
            if most > longest and tokens[: longest + 1] == text[: longest + 1]:
                best, longest = sequence, _common(tokens, text, longest + 1, most)
        return (best, longest) if best else (0, 0)

    def _verified(self, session: Session) -> list[int]:
        """The tokens in the canonical slots of ``session`` that the target has read. The root is not one of them: its
        numbers may turn out not to be finite, and then whoever shares them would not fail as it does alone."""
        return session.text[: min(self.allocator.length(session.sequence), session.tree.root.position)]

    def end(self, session: Session, is_whole: bool) -> None:
        """``session`` is over, and no row of it is in flight. ``is_whole``: every stage has computed what is in its
        canonical slots."""
        tokens = self._verified(session)
        if self._keeps and is_whole and len(tokens) >= LEAST_SHARED:
            self.allocator.retire(session.sequence)
            self._kept[session.sequence] = tokens
        else:
            self.allocator.free(session.sequence)


def _common(one: Sequence[int], other: Sequence[int], least: int, most: int) -> int:
    """For how many tokens, ``least`` to ``most``, ``one`` and ``other`` are equal; the first ``least`` are."""
    while least < most:
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least
