"""The messages between roles: one class per kind, and the rows that some of them carry.

A Message is an envelope (source, destination, transaction number) around a body, and the class of the body is the kind
of the message. wire.py gives each class its bytes.

A sequence is the token sequence of one request. Its id travels in every row, slot operation, advice and result, so that
runs of several sequences may be in flight at once. No two requests of a job share an id.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

MAX_ROWS = 1024
MAX_OPS = 1024
MAX_KEPT = 0xFFFF
"""Most canonical slots that a FORK shares or a TRUNCATE keeps: wire.py has 16 bits for the length of an operation."""
MAX_TOP = 20
"""Most (token, log-probability) pairs of a result row."""
MAX_BIASES = 300
"""Most tokens whose logits a request changes."""
MAX_GRAMMAR = 0xFFFF
"""Most bytes of a grammar."""
NO_TOKEN = -1
"""Stands for no token."""
NO_SLOT = 0xFFFFFFFF
"""The parent of a row that attends to the canonical slots of its sequence alone; in a Cancelled, every row of a run."""


class SlotOpKind(enum.IntEnum):
    """What happens to slots of a sequence. Operations apply in stream order, before the rows of the run that carries
    them."""

    COMMIT = 1  # slots [slot, slot + length) become canonical at positions [position, position + length)
    RELEASE = 2  # slots [slot, slot + length) become free
    FREE = 3  # the sequence has no slot any more: it is over
    TRUNCATE = 4  # the first ``length`` canonical positions stay, and no other slot of the sequence
    FORK = 5  # the sequence begins with the first ``length`` canonical slots of sequence ``slot``; they are shared


class SlotOp(NamedTuple):
    """One operation on ``length`` slots of ``sequence``: neighbours from ``slot`` on; the first ones (TRUNCATE, FORK).
    A slot is free when no sequence has it."""

    kind: SlotOpKind
    slot: int = 0
    length: int = 0
    position: int = 0
    sequence: int = 0


class Row(NamedTuple):
    """One token of a run. ``parent`` is the slot of the token before it, or NO_SLOT. Behind a stage where the row's
    numbers were not finite, ``token`` holds the layer instead: see ``fault_token``."""

    token: int
    slot: int
    parent: int
    position: int
    sequence: int = 0


class ResultRow(NamedTuple):
    """The target's next token after the row in ``slot``, with its log-probability (natural log). For a row whose
    numbers were not finite ``token`` holds the layer (see ``fault_token``) and ``logp`` is 0. Such rows come back even
    where no token was wanted after them. ``top_count``: how many of the result's ``top`` are this row's."""

    token: int
    slot: int
    position: int
    logp: float
    sequence: int = 0
    top_count: int = 0


class TopToken(NamedTuple):
    """One of the most probable tokens after a row, with its log-probability (natural log)."""

    token: int
    logp: float


class TokenBias(NamedTuple):
    """What is added to the logit of a token."""

    token: int
    bias: float


class DraftNode(NamedTuple):
    """A node of the draft tree: its name, the name of its parent, and log P(token | parent) by the draft model."""

    token: int
    node: int
    parent: int
    logp: float


class Cancelled(NamedTuple):
    """A dead row of ``sequence``: the one in ``slot`` of run ``run``, or all of them with NO_SLOT."""

    run: int
    slot: int
    sequence: int = 0


class Wants(enum.IntEnum):
    """After which rows of a run a token is wanted."""

    NOTHING = 0
    LAST = 1  # after the last row of each sequence
    EVERY = 2


class Hello(NamedTuple):
    """Stage, drafter -> orchestrator: I am ready. ``digest``: of my configuration."""

    digest: int


class Run(NamedTuple):
    """Orchestrator -> first stage -> ... -> last stage: slot operations and rows; the activations are its payload.

    ``is_canonical``: the rows are accepted tokens and extend the canonical slots (prefill). ``is_tombstone``: the run
    is dead; it carries its operations only, and nothing was computed. ``work_us``: the passes of all stages so far,
    ``slowest_us``: the longest of them (microseconds). ``next_tokens``: for each of ``rows`` the token that follows it
    in its prompt, if the log-probability of that token is wanted, else NO_TOKEN; empty if none is wanted."""

    run: int
    is_canonical: bool = False
    is_tombstone: bool = False
    wants: Wants = Wants.EVERY
    work_us: int = 0
    slowest_us: int = 0
    ops: tuple[SlotOp, ...] = ()
    rows: tuple[Row, ...] = ()
    next_tokens: tuple[int, ...] = ()


class Result(NamedTuple):
    """Last stage -> orchestrator: the target's token after each wanted row, prompt rows included; after a row with one
    of the run's ``next_tokens``, that one. ``top``: the most probable tokens after the first of ``rows``, best first,
    then those after the next one; of each row as many as its ``top_count`` says, which is its sequence's
    ``top_logprobs`` or, with a next token, ``prompt_logprobs``. The rest is as in Run."""

    run: int
    is_tombstone: bool = False
    work_us: int = 0
    slowest_us: int = 0
    rows: tuple[ResultRow, ...] = ()
    top: tuple[TopToken, ...] = ()

    def tops(self) -> list[tuple[TopToken, ...]]:
        """Of each row its part of ``top``."""
        found, end = list[tuple[TopToken, ...]](), 0
        for row in self.rows:
            found.append(self.top[end : end + row.top_count])
            end += row.top_count
        return found


class Credit(NamedTuple):
    """First stage -> orchestrator: one more run may follow run ``run``. The last run that was computed had ``rows``
    rows and took ``spent_us`` microseconds; 0 rows: none was."""

    run: int
    rows: int = 0
    spent_us: int = 0


class Cancel(NamedTuple):
    """Orchestrator -> stages: these rows are dead (advice). ``relay``: each stage passes it on to the one before."""

    relay: bool = False
    rows: tuple[Cancelled, ...] = ()


class Settings(NamedTuple):
    """Orchestrator -> first stage -> ... -> last stage, and -> drafters: a sequence begins, and this is how its tokens
    are drawn; see ports.Sampling. ``prompt_length``: of the request's own prompt, also where the sequence begins again
    with tokens that were generated before. ``prompt_logprobs``: -1 for None. ``grammar``: its text, byte by byte."""

    sequence: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int = 0
    prompt_length: int = 0
    prompt_logprobs: int = -1
    logit_bias: tuple[TokenBias, ...] = ()
    grammar: tuple[int, ...] = ()


class Prompt(NamedTuple):
    """Orchestrator -> drafter: the next tokens of the prompt of ``sequence``. ``is_last``: the prompt ends here.
    ``last_position``: no guess beyond this position is of use."""

    sequence: int
    last_position: int
    is_last: bool
    tokens: tuple[int, ...] = ()


class Nodes(NamedTuple):
    """Drafter -> orchestrator: new nodes of the draft tree of ``sequence``. ``root``: position of the drafter's root.
    ``ends_order``: the order is done."""

    sequence: int
    root: int
    ends_order: bool = False
    nodes: tuple[DraftNode, ...] = ()


class Advance(NamedTuple):
    """Orchestrator -> drafter: tokens of ``sequence`` accepted since the last Advance, the first one at ``position``.
    ``restart``: forget every guess and begin again at the last accepted token."""

    sequence: int
    position: int
    restart: bool = False
    tokens: tuple[int, ...] = ()


class Close(NamedTuple):
    """Orchestrator -> drafter: ``sequence`` is over."""

    sequence: int


class DraftOrder(NamedTuple):
    """Orchestrator -> drafter: evaluate ``passes`` more batches of at most ``draft_batch`` nodes (0: the policy's) and
    wait. Children less probable than ``cutoff`` are held back. ``restart``: as in Advance."""

    sequence: int
    restart: bool = False
    passes: int = 0
    draft_batch: int = 0
    cutoff: float = 0.0


class Calibrate(NamedTuple):
    """Orchestrator -> drafter: what its probabilities mean (see speculation.trees.calibration)."""

    revision: int
    outcomes: int
    slope: float
    offsets: tuple[float, ...] = ()


class Shutdown(NamedTuple):
    """Orchestrator -> everybody: the job is over."""


class Probe(NamedTuple):
    """Orchestrator -> everybody: what are you doing? (asked when nothing has moved for long)"""


class Status(NamedTuple):
    """The answer to a Probe. ``run``: the run (or a drafter's pass) being computed, or the last one. ``waiting``: runs
    in the queue. ``taken``: ordered messages received."""

    is_busy: bool
    run: int
    waiting: int
    taken: int


class Failed(NamedTuple):
    """Any rank -> orchestrator: I have failed and have reported why; end the job with ``exit_code``."""

    exit_code: int


Body = (
    Hello | Run | Result | Credit | Cancel | Settings | Prompt | Nodes | Advance | Close | DraftOrder | Calibrate
    | Shutdown | Probe | Status | Failed
)  # fmt: skip
CONTROL = frozenset({Cancel, Probe, Status, Failed})
"""Kinds that travel on CONTROL, where order and delivery are not promised."""


class Message(NamedTuple):
    """One message. ``txn`` counts the ordered messages from ``source`` to ``dest``, from 1; 0 on CONTROL.
    ``payload_nbytes``: bytes of the tensor that travels with it."""

    source: int
    dest: int
    body: Body
    txn: int = 0
    payload_nbytes: int = 0

    @property
    def is_control(self) -> bool:
        """Whether it travels on CONTROL."""
        return type(self.body) in CONTROL

    @property
    def kind(self) -> str:
        """The name of its kind."""
        return type(self.body).__name__

    @property
    def payload_rows(self) -> int:
        """Rows of the tensor that travels with it, if one does."""
        return len(self.body.rows) if type(self.body) is Run else 0


def fault_token(layer: int) -> int:
    """What stands for the token of a row whose numbers were not finite in ``layer`` (the number of layers: in the
    output head). Tokens themselves are never negative."""
    return -1 - layer


def fault_layer(token: int) -> int | None:
    """The layer that ``token`` holds, or None for a token."""
    return None if token >= 0 else -1 - token


def accepted_name(position: int) -> int:
    """The name that both sides of a draft tree give to the accepted token at ``position``."""
    return 0x80000000 | position
