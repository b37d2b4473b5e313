"""An emulated pair whose draft guesses as a real one did.

A record says what a real draft thought at one position of a text that its target wrote: the log-probabilities of its
choices, and which of them was the target's token. Records of a text follow each other, so that hits and misses come
together as they did there. The target, its tokens and the hash chain are those of stages/models/emulated.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeinfer.core.errors import LocalProtocolError
from pipeinfer.core.ports import SampledToken, SamplingInputs
from pipeinfer.sim.world import WorldPair, WorldSpec
from stages.models.emulated import EmulatedShard, Words

STRIDE = 997
"""Records between the beginnings of two requests, which their seeds tell apart."""


@dataclass(frozen=True, slots=True)
class Record:
    """``claims``: log-probabilities (natural log) of the draft's choices, best first. ``hit``: the one that was right,
    None if none was."""

    claims: tuple[float, ...]
    hit: int | None


def read_records(path: Path) -> list[Record]:
    """The records in ``path``: a list of [claims, hit]."""
    return [Record(tuple(claims), hit) for claims, hit in json.loads(path.read_text())]


def write_records(records: Sequence[Record], path: Path) -> None:
    """Write ``records``, a line each; claims are rounded to 0.01."""
    lines = [json.dumps([[round(claim, 2) for claim in one.claims], one.hit], separators=(",", ":")) for one in records]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


class RecordedPair(WorldPair):
    """The pair of ``spec``, whose draft guesses by ``records``."""

    def __init__(self, spec: WorldSpec, records: Sequence[Record]) -> None:
        super().__init__(spec)
        self._make_draft = partial(_RecordedDraft, records)


class _RecordedDraft(EmulatedShard):
    def __init__(self, records: Sequence[Record], *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._records = records

    def _choices(
        self, wanted: Words, words: Words, count: int, draw: SamplingInputs | None
    ) -> list[list[SampledToken]]:
        """See EmulatedShard: the choice at a position is that of the record there."""
        if draw is None:
            raise LocalProtocolError("a recorded draft needs to know the positions of its rows")
        starts = [STRIDE * sampling.seed for sampling in draw.samplings]
        places = (np.array(starts) + draw.positions) % len(self._records)
        vocab, found = self._spec.vocab, list[list[SampledToken]]()
        for truth, place in zip(self._truths(wanted), places.tolist(), strict=True):
            record = self._records[place]
            tokens = [(truth + 1 + index) % vocab for index in range(min(count, len(record.claims)))]
            if record.hit is not None and record.hit < len(tokens):
                tokens[record.hit] = truth
            found.append(list(zip(tokens, record.claims, strict=False)))
        return found
