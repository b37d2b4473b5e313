"""Candidates for a target's draft, measured as jobs would run with them.

Each candidate decodes the same prompts on a job of its own. Rounds of all candidates take turns, so that a machine that
becomes slower is not held against one of them. Medians count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from launch.preflight import Cleared, clear
from pipeinfer.bench.chain import ShardEvaluator
from pipeinfer.bench.passes import whole_shard
from pipeinfer.core.config import Config
from pipeinfer.core.errors import PipeinferError
from pipeinfer.core.metrics import percentile
from pipeinfer.core.ports import GREEDY, Sampling
from pipeinfer.engine.answer import Completion
from pipeinfer.engine.engine import Engine
from stages.checkpoint.spec import ModelSpec

WARM_TOKENS = 8
"""Of the first prompt, before anything is measured."""
Open = Callable[[str], AbstractContextManager[Engine | None]]
"""The engine of a job with the draft of that name; None on ranks that have only served."""


@dataclass(slots=True)
class Candidate:
    """What was found of a draft. ``speeds``, in tokens per second, and ``acceptances``: of each answer. ``agreement``:
    the share of tokens in which the draft's first choice is the target's, given the target's text; None where it is not
    known. ``weight_nbytes``: of each rank. ``texts``: prompts and answers. ``job``: the job's configuration.
    ``config``, ``calibrations``: see Completion."""

    name: str
    speeds: list[float] = field(default_factory=list)
    acceptances: list[float] = field(default_factory=list)
    agreement: float | None = None
    weight_nbytes: list[int] = field(default_factory=list)
    texts: list[tuple[list[int], list[int]]] = field(default_factory=list)
    job: Config | None = None
    config: dict[str, Any] = field(default_factory=dict)
    calibrations: dict[str, Any] = field(default_factory=dict)

    @property
    def speed(self) -> float:
        """The median."""
        return percentile(self.speeds, 0.5)

    def add(self, answer: Completion) -> None:
        """Count ``answer``."""
        self.speeds.append(answer.metrics["output_throughput"])
        self.acceptances.append(answer.metrics["acceptance_rate"])
        self.texts.append((list(answer.prompt_tokens), list(answer.tokens)))
        self.config, self.calibrations = answer.config, answer.calibrations


def measure_drafts(
    names: Sequence[str],
    open_engine: Open,
    prompts: Sequence[str],
    count: int,
    rounds: int,
    sampling: Callable[[Engine], Sampling],
    tell: Callable[[str], None],
) -> list[Candidate]:
    """Have a job with each draft decode ``count`` tokens after each of ``prompts``, ``rounds`` times. Returns the
    fastest candidate first; nothing on ranks other than the head. ``tell`` is told what is done. Collective.

    Raises PipeinferError where tokens differ: no draft may change them."""
    found = {name: Candidate(name) for name in names}
    is_greedy, ranks = False, 0
    for turn in range(rounds):
        for name, candidate in found.items():
            candidate.texts.clear()
            with open_engine(name) as engine:
                if engine is None:
                    continue
                how = sampling(engine)
                is_greedy, ranks = how.temperature == GREEDY.temperature, len(engine.ranks)
                candidate.job = engine.config
                candidate.weight_nbytes = [rank["weight_nbytes"] for rank in engine.ranks]
                engine.generate(prompts[0], WARM_TOKENS, sampling=how)
                for prompt in prompts:
                    candidate.add(engine.generate(prompt, count, sampling=how))
            _refuse_other_tokens(candidate, found[names[0]])
            tell(f"round {turn + 1} of {rounds}: {name}, {candidate.speeds[-1]:.1f} tokens/s")
    if not ranks:
        return []
    for candidate in found.values():
        if is_greedy and candidate.job and candidate.job.drafts:
            candidate.agreement = agreement(clear(candidate.job, ranks), candidate.texts)
    return sorted(found.values(), key=lambda one: -one.speed)


def _refuse_other_tokens(one: Candidate, other: Candidate) -> None:
    if one.texts != other.texts:
        raise PipeinferError(f"the tokens with draft {one.name} are not those with {other.name}")


def agreement(cleared: Cleared, texts: Sequence[tuple[list[int], list[int]]]) -> float | None:
    """See Candidate; of the first draft of ``cleared``, over ``texts``. None for a model that only transformers' code
    computes."""
    spec, weights = cleared.drafts[0]
    if not isinstance(spec, ModelSpec):
        return None
    longest = max(len(prompt) + len(answer) for prompt, answer in texts)
    draft = ShardEvaluator(whole_shard(spec, cleared.config.draft_dtypes[0], longest, weights))
    right = total = 0
    for prompt, answer in texts:
        guesses = draft.choices([*prompt, *answer][:-1], 0, len(answer))
        right += sum(guess == token for guess, token in zip(guesses, answer, strict=True))
        total += len(answer)
    return right / total


COLUMNS = ("draft", "agreement", "acceptance", "tokens/s", "weights, MB", "largest rank, MB")


def table(found: Sequence[Candidate]) -> Iterator[str]:
    """A heading and a line for each candidate. acceptance: the mean of the answers' acceptance rates, prompt lookup
    included; - if nothing was drafted. weights: of all ranks together."""
    rows = [COLUMNS, *[_row(one) for one in found]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for name, *values in rows:
        yield "  ".join([name.ljust(widths[0]), *map(str.rjust, values, widths[1:])])


def _row(one: Candidate) -> tuple[str, ...]:
    return (
        one.name,
        "-" if one.agreement is None else f"{one.agreement:.3f}",
        f"{sum(one.acceptances) / len(one.acceptances):.3f}" if any(one.acceptances) else "-",
        f"{one.speed:.1f}",
        f"{sum(one.weight_nbytes) / 1e6:.1f}",
        f"{max(one.weight_nbytes) / 1e6:.1f}",
    )
