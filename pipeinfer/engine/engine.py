"""The Python interface: an Engine decodes prompts, wherever its ranks are.

    from pipeinfer import Engine

    with Engine(ranks=4) as engine:                 # starts its own ranks on this machine
        print(engine.generate("def fib(n):").text)

In a program started by mpirun or srun the ranks are those of the job: rank 0 goes on, the others serve inside the
``with`` statement until rank 0 leaves it, and there ``engine`` is None.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from launch.environment import launched, refuse_singletons
from launch.preflight import Cleared, clear
from launch.signals import end_in_order
from pipeinfer.core.config import BUILTIN, Config, ModelName, draft_names, model_name
from pipeinfer.core.errors import UserError, exit_code, refuse
from pipeinfer.core.ports import Request, Sampling
from pipeinfer.core.sampling import checked_stops, exact
from pipeinfer.engine.answer import Completion, Handle, HeadJob
from pipeinfer.engine.generation import Generation, model_sampling
from pipeinfer.engine.prompt import Prompt, token_ids
from pipeinfer.text import Numbers, Text
from speculation.schedules.policy import PLAIN, read_policy
from speculation.trees.calibration_file import read_calibrations

if TYPE_CHECKING:
    from mpi4py import MPI

    from launch.job import Job
    from launch.mpi import World
    from launch.muster import Muster
    from launch.requests import RequestOutput
    from pipeinfer.text import Reader


class RefusedElsewhere(UserError):
    """The job was refused, and rank 0 says why."""

    is_told = True


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
        target: ModelName = BUILTIN,
        draft: ModelName | Sequence[ModelName] | None = None,
        drafters: int | None = None,
        ranks: int | None = None,
        policy: ModelName | None = None,
        settings: Sequence[str] = (),
        dtype: str = "fp32",
        context: int = 0,
        timeout_s: float = 120.0,
        comm: MPI.Intracomm | None = None,
        trace: ModelName | None = None,
        calibration: ModelName | None = None,
        forced_acceptance: float | Sequence[float] = (),
        random_weights: bool = False,
        check: Callable[[Engine], object] | None = None,
    ) -> None:
        self._job: Job | None = None  # of a rank that serves
        self._head: HeadJob | None = None
        self._text: Text | None = None
        self.traffic = (0, 0)  # messages and bytes between the ranks, once the engine is closed
        self._world = _world(comm)
        size = self._world.size if self._world else 1 if ranks is None else ranks

        def configure() -> Config:
            named = model_name(target, "target")
            drafts = draft_names(named, draft, drafters)
            name = _name(policy) if policy else "continuous" if size > 1 or draft or drafts else "plain"
            knobs, file = read_policy(name, settings).settings(), None if trace is None else _name(trace)
            known = {} if calibration is None else read_calibrations(_name(calibration))
            shares = forced_acceptance if isinstance(forced_acceptance, Sequence) else (forced_acceptance,)
            more = (known, tuple(map(float, shares)), random_weights)
            return Config(named, drafts, knobs, dtype, context, timeout_s, file, *more)

        def prepare() -> Cleared:
            if ranks not in (None, size):
                refuse(f"--ranks {ranks}, but the launcher started {size}", "leave out --ranks under mpirun or srun")
            self.config = configure()
            cleared = clear(self.config, size)
            self._know(cleared)
            if check is not None:
                check(self)
            return cleared

        if self._world is not None:
            self._join(self._world, timeout_s, configure, prepare)
        else:
            cleared = prepare()
            self._head = _spawn(self.config, size) if size > 1 else _lead(load_job(self.config, cleared))

    def _join(
        self, world: World, timeout_s: float, configure: Callable[[], Config], prepare: Callable[[], Cleared]
    ) -> None:
        """Be a rank of ``world``: the head checks everything before anything is loaded, the others learn the verdict
        and check what their hosts have; then all load. Whatever fails on one rank ends all. Raises UserError, all ranks
        alike, where the head refuses."""
        problem: UserError | None = None
        self._take_back = end_in_order()
        with world.guard():
            muster = world.muster(timeout_s)
            if world.is_head:
                try:
                    with muster.busy("checking"):
                        cleared = prepare()
                except UserError as error:
                    problem = error
            if world.agree(problem is not None, muster.poll):
                problem = problem or RefusedElsewhere("rank 0 says why")
        if problem is not None:
            self._take_back()
            raise problem
        with world.guard():
            if not world.is_head:
                with muster.busy("checking"):
                    self.config = configure()
                    cleared = clear(self.config, world.size)
            self._job = load_job(self.config, cleared, world, muster)
        if world.is_head:
            self._head = _lead(self._job, world)
            atexit.register(self._left_open)

    def _know(self, cleared: Cleared) -> None:
        """On the head: what requests are read and checked by."""
        spec, _ = cleared.target
        directory, forced = self.config.target_directory, bool(self.config.forced_acceptance)
        self.context = cleared.context
        self._vocab_size = spec.vocab_size
        self._text = (Numbers if forced else Text)(directory)
        self._stop_tokens = frozenset() if forced else self._text.eos_tokens | frozenset(spec.eos_tokens)
        defaults = Generation() if forced else model_sampling(directory)
        self.sampling, self.ignored = defaults.sampling, defaults.ignored

    @property
    def is_head(self) -> bool:
        """Whether this process submits requests."""
        return self._world is None or self._world.is_head

    @property
    def ranks(self) -> list[dict[str, Any]]:
        """Each rank's host, roles, layers, weight bytes and threads, as the head knows them."""
        return self._open().ranks

    def _open(self) -> HeadJob:
        if self._head is None:
            raise UserError("only an open engine on the head rank decodes; the others serve")
        return self._head

    def submit(
        self,
        prompt: Prompt,
        max_new_tokens: int = 128,
        ignore_eos: bool = False,
        chat: bool = False,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        watch: Callable[[RequestOutput], None] | None = None,
    ) -> Handle:
        """Have ``prompt`` (text, or token ids) decoded; from any thread. Requests queue in the order they come in.

        ``sampling``: None for what the model's generation_config.json says, greedy if it says nothing. ``stop``:
        strings before the first of which the text ends, or special tokens; ``tokens`` then ends with the one that
        completed it. ``watch``: called with all that the job tells, by whoever takes the pieces.
        Raises UserError for what cannot be served."""
        job = self._open()
        request, stops = self._request(prompt, max_new_tokens, ignore_eos, chat, sampling, stop)
        asked = {"max_new_tokens": max_new_tokens, "sampling": asdict(request.sampling), "stop": stops}
        config, forced = asdict(self.config) | asked, bool(self.config.forced_acceptance)
        tokens = list(request.prompt)
        answer = Completion(prompt_tokens=tokens, config=config, ranks=job.ranks, meaningless=forced)
        return Handle(job, request, self._reader(request, stops), answer, watch)

    def _request(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        ignore_eos: bool,
        chat: bool,
        sampling: Sampling | None,
        stop: str | Sequence[str],
    ) -> tuple[Request, list[str]]:
        """What the job is asked, and the strings that end the answer."""
        assert self._text is not None
        tokens = self.tokenize(prompt, max_new_tokens, chat)
        stop_tokens, stops = set() if ignore_eos else set(self._stop_tokens), list[str]()
        for text in checked_stops(stop):
            token = self._text.special_stop(text)
            if token is None:
                stops.append(text)
            else:
                stop_tokens.add(token)
        drawn = exact(self.sampling if sampling is None else sampling)
        return Request(tuple(tokens), max_new_tokens, frozenset(stop_tokens), drawn), stops

    def _reader(self, request: Request, stops: Sequence[str]) -> Reader:
        assert self._text is not None
        return self._text.reader(request.stop_tokens, stops, request.prompt)

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 128,
        ignore_eos: bool = False,
        chat: bool = False,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
    ) -> Generator[str | Completion, None, None]:
        """Decode ``prompt``: yields pieces of text as they become certain, then the Completion; see submit. A stream
        that is closed early is cancelled."""
        handle = self.submit(prompt, max_new_tokens, ignore_eos, chat, sampling, stop)
        return _stream(handle)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 128,
        ignore_eos: bool = False,
        chat: bool = False,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
    ) -> Completion:
        """Decode ``prompt`` to the end; see submit."""
        return self.submit(prompt, max_new_tokens, ignore_eos, chat, sampling, stop).result()

    def decode_alone(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        ignore_eos: bool = False,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
    ) -> list[int]:
        """What plain decoding says, by this process alone with the whole target in its memory, which is let go again:
        the reference."""
        from launch.head import LocalJob

        request, stops = self._request(prompt, max_new_tokens, ignore_eos, False, sampling, stop)
        config = replace(self.config, policy=PLAIN.settings(), drafts=(), context=self.context, trace=None)
        job = LocalJob(load_job(config, clear(config, 1)), is_threaded=False)
        try:
            return Handle(job, request, self._reader(request, stops), Completion()).result().tokens
        finally:
            job.close()

    def tokenize(self, prompt: Prompt, max_new_tokens: int, chat: bool = False) -> list[int]:
        """The prompt's tokens. Raises UserError for a prompt that cannot be served."""
        assert self._text is not None
        if isinstance(prompt, str):
            prompt = self._text.encode_chat(prompt) if chat else self._text.encode(prompt)
        elif chat:
            refuse("a chat of token ids", "give text, or leave chat out")
        tokens = token_ids(prompt, self._vocab_size)
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
        """On the other ranks of an MPI job: work until the head closes; where that fails, all ranks end."""
        assert self._world is not None and self._job is not None
        with self._world.guard():
            self._job.serve()
        self._end()

    def close(self) -> None:
        """On the head: cancel what is still being decoded, and let all ranks go; where that fails, all ranks end."""
        if self._head is not None:
            with nullcontext() if self._world is None else self._world.guard():
                self._head.close()
            self.traffic = self._head.traffic
            self._end()

    def _end(self) -> None:
        atexit.unregister(self._left_open)
        self._job = self._head = None
        if self._world is not None:
            self._world.close()
            self._take_back()

    def _left_open(self) -> None:
        """The program ends, and the engine is open; the other ranks would wait for it for ever."""
        world, error = self._world, getattr(sys, "last_value", None)
        if world is not None and world.has_failed:
            return  # all end already
        if world is not None and error is not None:
            world.abort(exit_code(error))
        self.close()

    def __enter__(self) -> Engine | None:
        if self.is_head:
            return self
        self.serve()
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and exit_code(error) == 0):
            self.close()
        elif self._world is not None:
            self._world.fail(error)
        elif self._head is not None:
            self._head.kill()


def _stream(handle: Handle) -> Generator[str | Completion, None, None]:
    try:
        yield from handle
        yield handle.result()
    finally:
        handle.cancel()  # where it has ended nothing happens


def _name(given: ModelName) -> str:
    """A name that a program gave, which may be a path."""
    try:
        return os.fsdecode(given)
    except TypeError:
        refuse(f"{given!r} is no name of a file or directory", "give text or a path")


def _world(comm: MPI.Intracomm | None) -> World | None:
    """The MPI job that this process is part of, or None."""
    launch = launched()
    if comm is None and (launch is None or launch.size == 1):
        return None
    from launch.mpi import World

    world = World(comm)
    if comm is None:
        _refuse_singletons(world)
    return world


def _refuse_singletons(world: World) -> None:
    launch = launched()
    try:
        refuse_singletons(launch, world.size)
    except UserError as error:
        raise (error if launch is None or launch.leads else RefusedElsewhere(str(error))) from None


def load_job(config: Config, cleared: Cleared, world: World | None = None, muster: Muster | None = None) -> Job:
    """See launch.job.load, which brings torch."""
    from launch.job import load

    return load(config, cleared, world, muster)


def _lead(job: Job, world: World | None = None) -> HeadJob:
    """``job`` as its head leads it: on a thread of its own, unless MPI is there and allows none."""
    from launch.head import LocalJob

    return LocalJob(job, world is None or world.may_thread, None if world is None else world.fail)


def _spawn(config: Config, ranks: int) -> HeadJob:
    from launch.spawn import SpawnedJob

    return SpawnedJob(config, ranks)
