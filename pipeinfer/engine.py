"""The Python interface: an Engine decodes prompts, wherever its ranks are.

    from pipeinfer import Engine

    with Engine(ranks=4) as engine:                 # starts its own ranks on this machine
        print(engine.generate("def fib(n):").text)

In a program started by mpirun or srun the ranks are those of the job: rank 0 goes on, the others serve inside the
``with`` statement until rank 0 leaves it, and there ``engine`` is None.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from launch.environment import launched, refuse_singletons
from pipeinfer.config import BUILTIN, Config
from pipeinfer.errors import UserError, refuse
from pipeinfer.metrics import measure
from pipeinfer.ports import Request
from pipeinfer.preflight import Cleared, clear
from pipeinfer.text import Text

if TYPE_CHECKING:
    from mpi4py import MPI

    from launch.job import Job
    from launch.mpi import World
    from launch.spawn import SpawnedJob


@dataclass(slots=True)
class Completion:
    """One answer. ``metrics`` are those of pipeinfer.metrics.measure; ``ranks`` says who computed it."""

    text: str = ""
    prompt_tokens: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)


class RefusedElsewhere(UserError):
    """The job was refused, and another rank says why."""


class Engine:
    """Decodes with ``target``, guided by ``draft``: directories in Hugging Face format, or ``"builtin"``.

    ranks: how many to start on this machine (default 1, which needs no MPI); inside mpirun or srun the job's own are
    used. policy: ``plain`` or ``continuous`` (the default where there are ranks to speculate with). dtype: ``fp32`` or
    ``bf16``. context: most tokens of a request. comm: an mpi4py communicator to use instead of MPI_COMM_WORLD.
    timeout_s: how long nothing may move before the job gives up and says who waits for whom. check: called on the head
    before any model is loaded; a UserError it raises refuses the job on all ranks. Raises UserError for what cannot be
    done as asked.
    """

    def __init__(
        self,
        target: str = BUILTIN,
        draft: str | None = None,
        ranks: int | None = None,
        policy: str | None = None,
        dtype: str = "fp32",
        context: int = 0,
        timeout_s: float = 120.0,
        comm: MPI.Intracomm | None = None,
        check: Callable[[Engine], object] | None = None,
    ) -> None:
        launch = launched()
        self._world: World | None = None
        self._job: Job | SpawnedJob | None = None
        self._text: Text | None = None
        if comm is not None or (launch is not None and launch.size > 1):
            from launch.mpi import World

            self._world = World(comm)
            if comm is None:
                _refuse_singletons(self._world)
        size = self._world.size if self._world else 1 if ranks is None else ranks
        if draft is None and target == BUILTIN:
            draft = BUILTIN
        policy = policy or ("continuous" if size > 1 and draft is not None else "plain")
        self.config = Config(str(target), None if draft is None else str(draft), policy, dtype, context, timeout_s)
        cleared = self._clear(size, ranks, check)
        if self._world is None and size > 1:
            from launch.spawn import SpawnedJob

            self._job = SpawnedJob(self.config, size)
        else:
            self._job = _load(self.config, cleared, self._world)

    def _clear(self, size: int, ranks: int | None, check: Callable[[Engine], object] | None) -> Cleared:
        """Check everything on the head, before anything is loaded; the others learn the verdict and do the same."""
        world, problem = self._world, None
        if self.is_head:
            try:
                if ranks not in (None, size):
                    refuse(
                        f"--ranks {ranks}, but the launcher started {size}", "leave out --ranks under mpirun or srun"
                    )
                cleared = clear(self.config, size)
                self.context = cleared.context
                self._stop_tokens = frozenset(cleared.target[0].eos_tokens)
                self._text = Text(self.config.target_directory)
                if check is not None:
                    check(self)
            except UserError as error:
                problem = error
        if world.agree(problem is not None) if world else problem:
            raise problem or RefusedElsewhere("rank 0 says why")
        return cleared if self.is_head else clear(self.config, size)

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
        self, prompt: str | list[int], max_new_tokens: int = 128, ignore_eos: bool = False, chat: bool = False
    ) -> Generator[str | Completion, None, None]:
        """Decode ``prompt`` (text, or token ids): yields pieces of text as they become certain, then the Completion."""
        text = self._text
        if text is None or self._job is None:
            raise UserError("only an open engine on the head rank decodes; the others serve")
        tokens = self.tokenize(prompt, max_new_tokens, chat)
        stop_tokens = frozenset() if ignore_eos else self._stop_tokens
        answer = Completion(prompt_tokens=tokens, config=asdict(self.config) | {"max_new_tokens": max_new_tokens})
        emitted_at: list[tuple[float, int]] = []
        decoder = text.stream()
        submitted_at = None
        for news in self._job.submit(Request(tuple(tokens), max_new_tokens, stop_tokens)):
            if submitted_at is None:
                submitted_at = news.at_s  # the first word is that the request has begun
            if news.tokens:
                answer.tokens += news.tokens
                emitted_at.append((news.at_s, len(news.tokens)))
                if piece := decoder.push([token for token in news.tokens if token not in stop_tokens]):
                    yield piece
            if news.tally is not None:
                answer.finish_reason = news.reason
                answer.metrics = measure(submitted_at, emitted_at, news.tally)
        if piece := decoder.close():
            yield piece
        answer.text = text.decode([token for token in answer.tokens if token not in stop_tokens])
        answer.ranks = self.ranks
        yield answer

    def generate(
        self, prompt: str | list[int], max_new_tokens: int = 128, ignore_eos: bool = False, chat: bool = False
    ) -> Completion:
        """Decode ``prompt`` to the end."""
        for piece in self.stream(prompt, max_new_tokens, ignore_eos, chat):
            if isinstance(piece, Completion):
                return piece
        raise AssertionError("a stream ends with its Completion")

    def decode_alone(self, prompt: list[int], max_new_tokens: int, ignore_eos: bool = False) -> list[int]:
        """What plain decoding says, by this process alone with the whole target in its memory: the reference."""
        config = replace(self.config, policy="plain", draft=None, context=self.context)
        stop_tokens = frozenset() if ignore_eos else self._stop_tokens
        job = _load(config, clear(config, 1), None)
        return [
            token for news in job.submit(Request(tuple(prompt), max_new_tokens, stop_tokens)) for token in news.tokens
        ]

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
        pair = CheckpointPair(cleared.target, cleared.draft, config.dtype)
        return Job(config, cleared.plan, cleared.context, pair, world)
    except BaseException as error:
        if world is not None:
            world.fail(error)
        raise
