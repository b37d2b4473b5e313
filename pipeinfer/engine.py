"""The Python interface: an Engine decodes prompts, wherever its ranks are.

    from pipeinfer import Engine

    with Engine(ranks=4) as engine:                 # starts its own ranks on this machine
        print(engine.generate("def fib(n):").text)

In a program started by mpirun or srun the ranks are those of the job: rank 0 goes on, the others serve inside the
``with`` statement until rank 0 leaves it, and there ``engine`` is None.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from launch.environment import launched, refuse_singletons
from pipeinfer.config import BUILTIN, Config, draft_names
from pipeinfer.errors import UserError, refuse
from pipeinfer.metrics import measure
from pipeinfer.ports import GREEDY, Request, Sampling
from pipeinfer.preflight import Cleared, clear
from pipeinfer.sampling import checked_stops, exact
from pipeinfer.text import Numbers, Text
from speculation.calibration_file import read_calibrations
from speculation.policy import PLAIN, read_policy

if TYPE_CHECKING:
    from mpi4py import MPI

    from launch.job import Job, News
    from launch.mpi import World
    from launch.spawn import SpawnedJob


@dataclass(slots=True)
class Completion:
    """One answer. ``metrics`` are those of pipeinfer.metrics.measure; ``calibrations`` what has been learnt of the
    sources' probabilities; ``ranks`` says who computed it; ``logprobs`` are those of ``tokens`` (natural logarithm), by
    the model's logits before anything was done to them. ``meaningless``: acceptance was forced, the models did not say
    these tokens."""

    text: str = ""
    prompt_tokens: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    calibrations: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    meaningless: bool = False


class RefusedElsewhere(UserError):
    """The job was refused, and another rank says why."""


class Engine:
    """Decodes with ``target``, guided by ``draft``: directories in Hugging Face format, or ``"builtin"``. There may be
    a draft for each of several ``drafters``, or one for all, or ``"none"``: then guesses are looked up in the text.

    ranks: how many to start on this machine (default 1, which needs no MPI); inside mpirun or srun the job's own are
    used. policy: ``plain`` (the default of one rank without a draft), ``continuous`` or a TOML file with a policy's
    knobs; settings: changes to it, as ``knob=value``. dtype: ``fp32`` or ``bf16``. context: most tokens of a
    request. comm: an mpi4py communicator to use instead of MPI_COMM_WORLD. timeout_s: how long nothing may move before
    the job gives up and says who waits for whom. trace: a file name; each rank N writes all that its roles are told and
    command to ``<trace>.rankN``, for ``pipeinfer replay``. calibration: a file that ``pipeinfer calibrate`` wrote.
    forced_acceptance: the probability that a draft's first choice is right, or those of its first, second, ...: the
    models compute as always, but the tokens mean nothing and are shown as numbers, and no token ends a text.
    random_weights: with it, the directories need only a config.json; without a tokenizer a prompt is its bytes.
    check: called on the head before any model is loaded; a UserError it raises refuses the job on all ranks. Raises
    UserError for what cannot be done as asked.
    """

    def __init__(
        self,
        target: str = BUILTIN,
        draft: str | Sequence[str] | None = None,
        drafters: int | None = None,
        ranks: int | None = None,
        policy: str | None = None,
        settings: Sequence[str] = (),
        dtype: str = "fp32",
        context: int = 0,
        timeout_s: float = 120.0,
        comm: MPI.Intracomm | None = None,
        trace: str | Path | None = None,
        calibration: str | Path | None = None,
        forced_acceptance: float | Sequence[float] = (),
        random_weights: bool = False,
        check: Callable[[Engine], object] | None = None,
    ) -> None:
        launch = launched()
        self._world: World | None = None
        self._job: Job | SpawnedJob | None = None
        self._text: Text | None = None
        self.traffic = (0, 0)  # messages and bytes between the ranks, once the engine is closed
        if comm is not None or (launch is not None and launch.size > 1):
            from launch.mpi import World

            self._world = World(comm)
            if comm is None:
                _refuse_singletons(self._world)
        size = self._world.size if self._world else 1 if ranks is None else ranks

        def configure() -> Config:
            drafts = draft_names(str(target), draft, drafters)
            name = policy or ("continuous" if size > 1 or draft or drafts else "plain")
            knobs, file = read_policy(name, settings).settings(), None if trace is None else str(trace)
            known = {} if calibration is None else read_calibrations(calibration)
            shares = forced_acceptance if isinstance(forced_acceptance, Sequence) else (forced_acceptance,)
            more = (known, tuple(map(float, shares)), random_weights)
            return Config(str(target), drafts, knobs, dtype, context, timeout_s, file, *more)

        cleared = self._clear(size, ranks, configure, check)
        if self._world is None and size > 1:
            from launch.spawn import SpawnedJob

            self._job = SpawnedJob(self.config, size)
        else:
            self._job = _load(self.config, cleared, self._world)

    def _clear(
        self,
        size: int,
        ranks: int | None,
        configure: Callable[[], Config],
        check: Callable[[Engine], object] | None,
    ) -> Cleared:
        """Check everything on the head, before anything is loaded; the others learn the verdict and do the same."""
        world, problem = self._world, None
        if self.is_head:
            try:
                if ranks not in (None, size):
                    refuse(
                        f"--ranks {ranks}, but the launcher started {size}", "leave out --ranks under mpirun or srun"
                    )
                self.config = configure()
                cleared = clear(self.config, size)
                self.context = cleared.context
                forced = bool(self.config.forced_acceptance)
                self._stop_tokens = frozenset(() if forced else cleared.target[0].eos_tokens)
                self._text = (Numbers if forced else Text)(self.config.target_directory)
                if check is not None:
                    check(self)
            except UserError as error:
                problem = error
        if world.agree(problem is not None) if world else problem:
            raise problem or RefusedElsewhere("rank 0 says why")
        if self.is_head:
            return cleared
        try:
            self.config = configure()
            return clear(self.config, size)
        except UserError as error:  # what the head's host has, this one lacks
            assert world is not None
            world.fail(error)

    @property
    def is_head(self) -> bool:
        """Whether this process submits requests."""
        return self._world is None or self._world.is_head

    @property
    def ranks(self) -> list[dict[str, Any]]:
        """Each rank's host, roles, layers, weight bytes and threads, as the head knows them."""
        assert self._job is not None
        return self._job.ranks

    def stream(
        self,
        prompt: str | list[int],
        max_new_tokens: int = 128,
        ignore_eos: bool = False,
        chat: bool = False,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
        watch: Callable[[News], None] | None = None,
    ) -> Generator[str | Completion, None, None]:
        """Decode ``prompt`` (text, or token ids): yields pieces of text as they become certain, then the Completion.

        ``stop``: strings before the first of which the text ends; ``tokens`` then ends with the one that completed it.
        ``watch``: called with all that the job tells, before anything is yielded.
        Raises UserError for what cannot be served."""
        text = self._text
        if text is None or self._job is None:
            raise UserError("only an open engine on the head rank decodes; the others serve")
        tokens = self.tokenize(prompt, max_new_tokens, chat)
        stop_tokens = frozenset() if ignore_eos else self._stop_tokens
        request = Request(tuple(tokens), max_new_tokens, stop_tokens, exact(sampling))
        stops = checked_stops(stop)
        asked = {"max_new_tokens": max_new_tokens, "sampling": asdict(request.sampling), "stop": list(stops)}
        config, forced = asdict(self.config) | asked, bool(self.config.forced_acceptance)
        answer = Completion(prompt_tokens=tokens, config=config, ranks=self.ranks, meaningless=forced)
        reader = text.reader(stop_tokens, stops)
        emitted_at: list[tuple[float, int]] = []
        submitted_at = None
        for news in self._job.submit(request):
            if watch is not None:
                watch(news)
            if submitted_at is None:
                submitted_at = news.at_s  # the first word is that the request has begun
            if news.tokens and not reader.is_stopped:
                count, piece = reader.read(news.tokens)
                answer.tokens += news.tokens[:count]
                answer.logprobs += news.logps[:count]
                emitted_at.append((news.at_s, count))
                if reader.is_stopped:
                    self._job.withdraw()
                if piece:
                    yield piece
            if news.tally is not None:
                answer.finish_reason = news.reason
                answer.metrics = measure(submitted_at, emitted_at, news.tally)
                answer.calibrations = news.tally.calibrations
        if piece := reader.close():
            yield piece
        if reader.is_stopped:
            answer.text, answer.finish_reason = reader.shown, "stop"
        else:
            answer.text = text.decode([token for token in answer.tokens if token not in stop_tokens])
        yield answer

    def generate(
        self,
        prompt: str | list[int],
        max_new_tokens: int = 128,
        ignore_eos: bool = False,
        chat: bool = False,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
    ) -> Completion:
        """Decode ``prompt`` to the end; see stream."""
        for piece in self.stream(prompt, max_new_tokens, ignore_eos, chat, sampling, stop):
            if isinstance(piece, Completion):
                return piece
        raise AssertionError("a stream ends with its Completion")

    def decode_alone(
        self,
        prompt: list[int],
        max_new_tokens: int,
        ignore_eos: bool = False,
        sampling: Sampling = GREEDY,
        stop: str | Sequence[str] = (),
    ) -> list[int]:
        """What plain decoding says, by this process alone with the whole target in its memory: the reference."""
        assert self._text is not None
        config = replace(self.config, policy=PLAIN.settings(), drafts=(), context=self.context, trace=None)
        stop_tokens = frozenset() if ignore_eos else self._stop_tokens
        job = _load(config, clear(config, 1), None)
        reader, tokens = self._text.reader(stop_tokens, checked_stops(stop)), list[int]()
        for news in job.submit(Request(tuple(prompt), max_new_tokens, stop_tokens, exact(sampling))):
            count, _ = reader.read(news.tokens)
            tokens += news.tokens[:count]
            if count and reader.is_stopped:
                job.withdraw()
        return tokens

    def tokenize(self, prompt: str | list[int], max_new_tokens: int, chat: bool = False) -> list[int]:
        """The prompt's tokens. Raises UserError for a prompt that cannot be served."""
        assert self._text is not None
        if isinstance(prompt, str):
            tokens = self._text.encode_chat(prompt) if chat else self._text.encode(prompt)
        else:
            tokens = list(prompt)
        if not tokens:
            refuse("the prompt is empty", "give at least one token of text")
        if max_new_tokens < 1:
            refuse(f"{max_new_tokens} new tokens", "ask for at least one")
        if len(tokens) + max_new_tokens > self.context:
            refuse(
                f"the prompt's {len(tokens)} tokens and {max_new_tokens} new ones exceed the context of {self.context}",
                "shorten the prompt, ask for fewer tokens, or raise --context where the model allows it",
            )
        return tokens

    def serve(self) -> None:
        """On the other ranks of an MPI job: work until the head closes."""
        from launch.job import Job

        assert isinstance(self._job, Job)
        self._job.serve()
        self._end()

    def close(self) -> None:
        """On the head: let all ranks go."""
        if self._job is not None:
            self._job.close()
            self.traffic = self._job.traffic
            self._end()

    def _end(self) -> None:
        self._job = None
        if self._world is not None:
            self._world.close()

    def __enter__(self) -> Engine | None:
        if self.is_head:
            return self
        self.serve()
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._world is not None:
            self._world.fail(error)
        elif self._job is not None:
            self._job.kill()


def _refuse_singletons(world: World) -> None:
    launch = launched()
    try:
        refuse_singletons(launch, world.size)
    except UserError as error:
        raise (error if launch is None or launch.leads else RefusedElsewhere(str(error))) from None


def _load(config: Config, cleared: Cleared, world: World | None) -> Job:
    """Load this rank's share of the models; where that fails in a job of several ranks, all of them end."""
    try:
        from launch.job import Job
        from stages.pair import CheckpointPair

        if world is not None:
            import torch

            torch.set_num_threads(world.threads)
        pair = CheckpointPair(cleared.target, cleared.drafts, config.dtype, config.forced_acceptance)
        return Job(config, cleared.plan, cleared.context, pair, world)
    except BaseException as error:
        if world is not None:
            world.fail(error)
        raise
