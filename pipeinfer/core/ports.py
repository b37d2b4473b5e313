"""What joins the machines to the world: events in, commands out, and the few things a driver must provide."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pipeinfer.core.messages import Message, TopToken
from pipeinfer.core.sampling import GREEDY as GREEDY
from pipeinfer.core.sampling import SampledToken as SampledToken
from pipeinfer.core.sampling import Sampling as Sampling
from pipeinfer.core.sampling import SamplingInputs as SamplingInputs

Payload = Any
"""Activations on their way between shards: [rows, hidden]. Machines pass them on and never look inside."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one pass through a shard, ready for attention.

    ``tokens``, ``positions``, ``slots``: int64 [rows]; row r writes slot ``slots[r]`` of its own shard.

    What a row attends to is a list of slots in order of position. Row r attends to the first ``prefix[r]`` canonical
    slots of its sequence, then to its own ancestors, of which it is the last itself:
    ``ancestors[ancestor_ends[r - 1] : ancestor_ends[r]]``, from 0 on for the first row.

    ``canonical``: for each sequence that has rows here int64 [ranges, 2], first slot and count of each range of its
    canonical slots, in order of position. ``sequence``: int64 [rows], the index into ``canonical`` of each row's
    sequence. ``prefix``: int64 [rows]. ``ancestors``: int64 [any]. ``ancestor_ends``: int64 [rows].
    """

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    canonical: tuple[npt.NDArray[np.int64], ...]
    sequence: npt.NDArray[np.int64]
    prefix: npt.NDArray[np.int64]
    ancestors: npt.NDArray[np.int64]
    ancestor_ends: npt.NDArray[np.int64]


class ShardModel(Protocol):
    """Some layers of a model with the key/value slots of those layers."""

    def forward(self, batch: Batch, hidden: Payload | None) -> Generator[float, None, Payload]:
        """Run the layers; ``hidden`` is None for the shard that embeds. Yields between layers the seconds it would rest
        before it goes on (0 for a real model; for an emulated one its pace, after the last layer too); returns the
        activations."""
        ...

    def sample(
        self, hidden: Payload, rows: Sequence[int], count: int, draw: SamplingInputs | None = None
    ) -> list[list[SampledToken]]:
        """The ``count`` best next tokens after each of ``rows``, best first; the first one is what ``draw`` draws, by
        default the most probable one. Where ``draw`` gives a token, it stands for all of them. Behind them, unless they
        are guesses, come the most probable tokens by the model's own logits, best first and of equal ones the lowest:
        as many as the row's ``top_logprobs`` says, or all there are. What stands for a row of ``faults`` means nothing.
        Only for the last shard.
        Log-probabilities are those of the model's own logits; for a guess, of its scores with the noise of the draw in
        them: how likely another model, given the same noise, is to draw that token."""
        ...

    @property
    def faults(self) -> Mapping[int, int]:
        """Rows of the last pass whose numbers were not finite, and the first layer of the whole model where that
        showed; the model's number of layers stands for the output head (``sample``). Such a row's activations are
        zeros, and so is what was not finite of its keys and values."""
        ...

    @property
    def weight_nbytes(self) -> int:
        """Bytes of weights that this shard holds resident."""
        ...


# Events: what a machine handles.


@dataclass(frozen=True, slots=True)
class Received:
    """A message arrived, whole with its payload."""

    message: Message
    payload: Payload | None = None


@dataclass(frozen=True, slots=True)
class Computed:
    """A Compute command ended: with activations, with choices, or abandoned (both None). ``seconds``: what it took once
    it was this role's turn. ``faults``: see ShardModel."""

    job: int
    hidden: Payload | None = None
    choices: list[list[SampledToken]] | None = None
    seconds: float = 0.0
    faults: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """One generation. ``stop_tokens`` end it; they are emitted as its last token. ``max_new_tokens``: 0 where only
    log-probabilities of the prompt are wanted. ``priority``: of requests that wait, those with the lowest are served
    first (as in vLLM)."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop_tokens: frozenset[int] = frozenset()
    sampling: Sampling = GREEDY
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Started:
    """The role's model is loaded and its transport is up."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """A user's request reached the orchestrator; it is served after those before it. ``number``: the caller's id of
    the request, which no other request has that is waiting or being served."""

    request: Request
    number: int = 0


@dataclass(frozen=True, slots=True)
class Aborted:
    """The user wants no more of request ``number``, waiting or being served. Nothing happens if it has ended."""

    number: int = 0


@dataclass(frozen=True, slots=True)
class Closed:
    """No further request will come. Requests that wait or are being served are aborted first."""


@dataclass(frozen=True, slots=True)
class Stalled:
    """Nothing has moved for long: find out who waits for whom."""


@dataclass(frozen=True, slots=True)
class Woke:
    """The time asked for with Wake has come."""


Event = Started | Received | Computed | Submitted | Aborted | Closed | Stalled | Woke


# Commands: what a machine asks for.


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message; ``payload`` travels beside it."""

    message: Message
    payload: Payload | None = None


@dataclass(frozen=True, slots=True)
class Compute:
    """Run this role's shard. With ``choices`` > 0 its choices after ``rows``, drawn by ``draw``, are wanted, else its
    activations.

    ``keep``: the rows of ``hidden`` that ``batch`` is about, where some have died on the way."""

    job: int
    batch: Batch
    hidden: Payload | None = None
    keep: tuple[int, ...] | None = None
    rows: tuple[int, ...] = ()
    choices: int = 0
    draw: SamplingInputs | None = None


@dataclass(frozen=True, slots=True)
class Abandon:
    """Stop this computation at the next layer boundary; a Computed without content follows."""

    job: int


@dataclass(frozen=True, slots=True)
class Wake:
    """Send a Woke at time ``at``, or at the next layer boundary after it; replaces the one asked for before."""

    at: float


@dataclass(frozen=True, slots=True)
class Emit:
    """These tokens of request ``number`` are final: show them. ``logps``: their log-probabilities (natural log) by the
    target's logits. ``tops``: the most probable tokens in the place of each, where the request wants them."""

    tokens: tuple[int, ...]
    logps: tuple[float, ...] = ()
    number: int = 0
    tops: tuple[tuple[TopToken, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """The log-probabilities (natural log) of the next tokens of the prompt of request ``number``, by the target's
    logits, from its second token on. ``tops``: the most probable tokens in the place of each, where the request wants
    them. All come before the request's first token."""

    logps: tuple[float, ...]
    number: int = 0
    tops: tuple[tuple[TopToken, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """Request ``number`` has no further token: ``stop``, ``length``, ``aborted`` or ``error``. ``fault``: with
    ``error``, the target's layer whose numbers are not finite; the number of layers stands for the output head."""

    reason: str
    number: int = 0
    fault: int | None = None


@dataclass(frozen=True, slots=True)
class Idle:
    """Every run of the finished request ``number`` has come back; the next one that waits begins."""

    stats: RequestStats
    number: int = 0


@dataclass(frozen=True, slots=True)
class Note:
    """Something was decided that a reader of the trace wants to know."""

    what: str


@dataclass(frozen=True, slots=True)
class Halt:
    """This role has ended."""


Output = Emit | Score | Finish | Idle
"""What is for whoever submitted a request."""
Command = Send | Compute | Abandon | Wake | Output | Note | Halt


@dataclass(slots=True)
class RequestStats:
    """What one request cost, counted by the orchestrator."""

    runs: int = 0  # runs launched after prefill
    cancelled_runs: int = 0  # of them, found dead before their result
    tombstones: int = 0  # of them, skipped by a stage before they were computed to the end
    rows: int = 0  # rows launched after prefill
    drafted: int = 0  # of them, speculative ones
    accepted: int = 0  # drafted rows whose token was emitted
    corrections: int = 0  # emitted tokens that no row in flight held
    verifications: int = 0  # runs after prefill that carried the root of their time, so that tokens were emitted
    prefill_runs: int = 0
    cancel_s: float = 0.0  # seconds from a run's cancel to its tombstone's return, of all tombstones
    busy_s: float = 0.0  # seconds that a stage worked on runs after prefill, the mean of all stages
    verified_guesses: int = 0  # guesses that the target verified, in all requests so far
    claimed_error: float = 0.0  # their expected calibration error as the drafts claimed them
    believed_error: float = 0.0  # and as the tree believed them
    calibrations: dict[str, Any] = field(default_factory=dict)  # what was learnt of each source
    acceptance_histogram: list[int] = field(default_factory=list)  # steps by how many drafted rows they accepted

    def emit(self, is_drafted: bool) -> None:
        """Count an emitted token, which a drafted row held or none. A step ends with a correction; the first one is the
        prompt's own successor, which ends none."""
        if is_drafted:
            self.accepted += 1
            return
        self.corrections += 1
        if self.corrections == 1:
            return
        histogram = self.acceptance_histogram
        step = self.accepted - sum(length * count for length, count in enumerate(histogram))
        histogram += [0] * (step + 1 - len(histogram))
        histogram[step] += 1


class Machine(Protocol):
    """A role's brain: no clock, no socket, no tensor, no log; the same events give the same commands."""

    address: int

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take one event at time ``now`` (seconds, monotonic) and return the commands that follow."""
        ...


class Transport(Protocol):
    """Moves messages between ranks. Only ``wait`` and ``close`` take their time."""

    @property
    def messages(self) -> int:
        """How many it has sent."""
        ...

    @property
    def nbytes(self) -> int:
        """Their bytes, payloads included."""
        ...

    def send(self, rank: int, message: Message, payload: Payload | None) -> None:
        """Hand over a message and its payload; both may be reused by the caller afterwards."""
        ...

    def poll(self) -> list[Received]:
        """Move everything forward; return what has arrived whole, in order per sender."""
        ...

    def wait(self, most_s: float) -> None:
        """Sleep until something may have arrived, or for ``most_s`` seconds."""
        ...

    def wake(self) -> None:
        """End the ``wait`` of the thread that drives it; may be called from any thread."""
        ...

    def close(self) -> None:
        """Wait until everything sent is gone. Collective."""
        ...


class Pair(Protocol):
    """A target model that can be cut into stages, and the draft model of each drafter."""

    @property
    def layers(self) -> int:
        """The target's layers."""
        ...

    @property
    def draft_contexts(self) -> tuple[int, ...]:
        """Of each drafter the positions that its model was made for; empty if none has a limit."""
        ...

    def stage(self, layers: range, capacity: int) -> ShardModel:
        """The target's ``layers`` with ``capacity`` slots; with the first layer comes the embedding, with the last the
        output head."""
        ...

    def draft(self, index: int, capacity: int) -> ShardModel:
        """The whole draft model of the ``index``-th drafter with ``capacity`` slots."""
        ...

    def pack(self, hidden: Payload) -> npt.NDArray[np.uint8]:
        """The bytes of activations, without a copy where possible."""
        ...

    def unpack(self, data: npt.NDArray[np.uint8], rows: int) -> Payload:
        """The activations in ``data``, of ``rows`` rows; a window on ``data``."""
        ...

    def blank(self, rows: int) -> Payload:
        """Activations of ``rows`` rows that mean nothing, for a trial pass."""
        ...
