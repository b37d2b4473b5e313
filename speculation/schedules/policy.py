"""Policies: a schedule and its numbers. Every rival and every ablation is a policy of the one engine.

A policy names a *schedule* and sets its knobs. ``plain`` and ``continuous`` are built in; all others are TOML files
with one knob a line (benchmarks/baselines has the rivals), and ``--set knob=value`` changes a single one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pipeinfer.core.errors import refuse
from pipeinfer.core.messages import MAX_ROWS

SCHEDULES = ("continuous", "rounds", "pipeinfer")
CANCELS = ("direct", "relay", "off")


@dataclass(frozen=True, slots=True)
class Policy:
    """The knobs, by the names that papers and engines use.

    A run has at most ``max_rows`` tree nodes. The drafter evaluates up to ``draft_batch`` nodes per pass, proposes
    ``topk`` children for each, and stays at most ``max_ahead`` evaluated nodes ahead of the accepted text.
    """

    name: str
    speculate: bool = True
    schedule: str = "continuous"  # "continuous"; "rounds": one run per trip; "pipeinfer": as PipeInfer was published
    max_rows: int = 1
    topk: int = 1
    draft_batch: int = 1
    max_ahead: int = 0
    window: int = 0  # maximum number of runs in flight; 0 means 2 * stages + 2
    min_path_prob: float = 0.0  # least path probability that is worth a row
    cancel: str = "direct"  # "direct": to every stage at once; "relay": backwards from stage to stage; "off"
    cancel_rows: bool = True  # also cancel single rejected rows of runs that have other rows
    reuse: bool = True  # False: discard the whole tree whenever the draft's first choice was wrong
    govern: bool = False  # adapt rows and drafting to the measured time per committed token
    launch_delay: bool = False  # with govern: a run may wait for the draft pass under way
    calibrate: bool = False  # fit the drafts' probabilities to observed acceptance
    prompt_lookup: int = 0  # maximum number of tokens drafted by prompt lookup; 0: off
    prefill_chunk: int = 128  # maximum number of prompt tokens per run
    fit_chunks: bool = True  # runs of prompts have as many as bring the first token earliest; False: prefill_chunk
    balance: bool = True  # a run has at most a stage's share of the known tokens of many requests
    speculate_below: int = 0  # rounds: number of requests from which on nothing is drafted; 0: always
    most_drafted: int = 0  # rounds: drafted rows of a run, the most probable of all requests; 0: max_rows of each
    num_steps: int = 1  # rounds: draft passes per round
    p_accept: float = 0.0  # pipeinfer: least probability of a drafted token
    p_recovery: float = 0.0  # pipeinfer: added to p_accept per run launched without a result
    p_decay: float = 0.0  # pipeinfer: subtracted from p_accept per refused micro-batch

    def __post_init__(self) -> None:
        for what in ("max_rows", "topk", "draft_batch", "prefill_chunk", "num_steps"):
            if not 1 <= getattr(self, what) <= MAX_ROWS:
                raise ValueError(f"policy {self.name}: {what} must be 1 to {MAX_ROWS}, not {getattr(self, what)}")
        if self.draft_batch * self.topk > MAX_ROWS:
            raise ValueError(f"policy {self.name}: draft_batch x topk must be at most {MAX_ROWS}")
        for what in ("max_ahead", "window", "prompt_lookup", "speculate_below", "most_drafted"):
            if not 0 <= getattr(self, what) <= 1_000_000:
                raise ValueError(f"policy {self.name}: {what} must be 0 or more, not {getattr(self, what)}")
        for what in ("min_path_prob", "p_accept", "p_recovery", "p_decay"):
            if not 0 <= getattr(self, what) <= 1:
                raise ValueError(f"policy {self.name}: {what} must be 0 to 1, not {getattr(self, what)}")
        for what, known in (("cancel", CANCELS), ("schedule", SCHEDULES)):
            if getattr(self, what) not in known:
                raise ValueError(
                    f"policy {self.name}: {what} must be {', '.join(known[:-1])} or {known[-1]}, "
                    f"not {getattr(self, what)!r}"
                )

    def most_nodes(self) -> int:
        """A bound on the nodes of one drafter's tree."""
        return (self.max_ahead + self.draft_batch + 1) * (self.topk + 1) + 1

    def most_runs(self, stages: int) -> int:
        """A bound on the runs in flight over ``stages`` stages."""
        return self.window or 2 * stages + 2

    def most_guesses(self, stages: int) -> int:
        """KV slots of a target shard for drafted tokens in flight, beside those for accepted tokens."""
        return self.max_rows * self.most_runs(stages) if self.speculate else 0

    def settings(self) -> dict[str, Any]:
        """All knobs by name, as in a Config."""
        return asdict(self)


PLAIN = Policy("plain", speculate=False)
CONTINUOUS = Policy(
    "continuous",
    max_rows=32,
    topk=8,
    draft_batch=8,
    max_ahead=224,
    min_path_prob=0.02,
    govern=True,
    launch_delay=True,
    calibrate=True,
    prompt_lookup=16,
)
POLICIES = {policy.name: policy for policy in (PLAIN, CONTINUOUS)}


def read_policy(name: str, changes: Sequence[str] = ()) -> Policy:
    """The policy called ``name``, or in the TOML file of that name, with ``changes`` (``knob=value``) made to it.

    Raises UserError, whose message names the knob and the fix."""
    settings = POLICIES[name].settings() if name in POLICIES else _read_file(name)
    for change in changes:
        knob, equals, value = change.partition("=")
        if not equals:
            refuse(f"--set {change}", "write it as knob=value")
        settings |= _typed(f"--set {change}", {knob: _literal(value)})
    try:
        return Policy(**settings)
    except ValueError as error:
        refuse(str(error), "correct the number")


def _read_file(name: str) -> dict[str, Any]:
    path = Path(name)
    if not path.is_file():
        built_in = ", ".join(POLICIES)
        refuse(f"unknown policy {name!r}", f"use {built_in} or a TOML file such as those in benchmarks/baselines")
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        refuse(f"{path} is no TOML file ({error})", "correct it")
    base = settings.pop("base", None)
    if base is not None and base not in list(POLICIES):  # a list, because a TOML value may be unhashable
        refuse(f"{path}: base {base!r} is no built-in policy", f"use {', '.join(POLICIES)}")
    known = POLICIES[base].settings() if base else {}
    return {**known, "name": path.stem, **_typed(str(path), settings)}


def _typed(where: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings``, checked: every key is a knob, every value has the knob's type."""
    kinds = {field.name: type(getattr(PLAIN, field.name)) for field in fields(Policy)}
    found = {}
    for knob, value in settings.items():
        kind = kinds.get(knob)
        if kind is None:
            refuse(f"{where}: there is no knob {knob!r}", f"the knobs are {', '.join(kinds)}")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            refuse(f"{where}: {knob} is not of type {kind.__name__}", "correct it")
        found[knob] = value
    return found


def _literal(text: str) -> Any:
    """``text`` as a TOML value; a bare word is a string."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return found["value"] if len(found) == 1 else text
