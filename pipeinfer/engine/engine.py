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
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from launch.preflight import Cleared, clear
from launch.signals import end_in_order
from pipeinfer.core.config import (
    ACTIVATIONS,
    AUTO,
    BUILTIN,
    FUSED,
    NUMERICS,
    Config,
    ModelName,
    byte_count,
    draft_names,
    model_name,
)
from pipeinfer.core.errors import UserError, exit_code, refuse
from pipeinfer.core.grammar import schema_grammar
from pipeinfer.core.ports import Sampling
from pipeinfer.engine.answer import Completion, Handle, HeadJob
from pipeinfer.engine.opening import RefusedElsewhere, lead_job, load_job, open_world, spawn_job
from pipeinfer.engine.prompt import Prompt
from pipeinfer.engine.request_builder import RequestBuilder
from speculation.schedules.policy import PLAIN, read_policy
from speculation.trees.calibration_file import read_calibrations

if TYPE_CHECKING:
    from mpi4py import MPI

    from launch.job import Job
    from launch.mpi import World
    from launch.requests import RequestOutput


MAX_NUM_SEQS = 8
"""Requests that are decoded at once unless a program says how many."""


class Engine:
    """Decodes with ``target``, guided by ``draft``: directories in Hugging Face format, GGUF files, or ``"builtin"``.
    There may be a draft for each of several ``drafters``, or one for all, or ``"none"``: then guesses are looked up in
    the text. tokenizer: a directory that has another tokenizer than the target's own.

    ranks: how many to start on this machine (default 1, which needs no MPI); inside mpirun or srun the job's own are
    used. policy: ``plain`` (the default of one rank without a draft), ``continuous`` or a TOML file with a policy's
    knobs; settings: changes to it, as ``knob=value``. dtype: of weights and KV slots: ``auto`` for what each
    checkpoint says, or ``fp32``, ``bf16`` or ``fp16``. numerics: ``portable`` for the same bits on every processor, or
    ``fast``. activations: ``fp32``, or ``int8`` to multiply quantised weights by integers. threads: of each rank
    (default: its fair share of the cores). tp: ranks that share each stage; stages: how many there have to be; fused:
    how those ranks exchange activations, ``auto``, ``on`` or ``off``. context: most tokens of a request. max_num_seqs:
    requests that are decoded at once; others wait. kv_memory: bytes of each rank for keys and values, as a number or as
    ``8G`` (default: what so many whole contexts need, which is taken from the system as it is used). weights_memory:
    bytes of each rank for the target's weights, as ``8G``; others are read from the files in each pass (default: all
    are resident). prefix_caching: whether a request that begins like an earlier one shares what that has computed.
    comm: an mpi4py communicator to use instead of MPI_COMM_WORLD. timeout_s: how long nothing may move before the job
    gives up and says who waits for whom. trace: a file name; each rank N writes all that its roles are told and command
    to ``<trace>.rankN``, for ``pipeinfer replay``. calibration: a file that ``pipeinfer calibrate`` wrote.
    forced_acceptance: the probability that a draft's first choice is right, or those of its first, second, ...: the
    models compute as always, but the tokens mean nothing and are shown as numbers, and no token ends a text.
    random_weights: with it, the directories need only a config.json; without a tokenizer a prompt is its bytes. check:
    called on the head before any model is loaded; a UserError it raises refuses the job on all ranks. Raises UserError
    for what cannot be done as asked.
    """

    traffic = (0, 0)  # messages and bytes between the ranks, once the engine is closed
    _job: Job | None = None  # of a rank that serves
    _head: HeadJob | None = None
    _builder: RequestBuilder | None = None  # on the head

    def __init__(
        self,
        target: ModelName = BUILTIN,
        draft: ModelName | Sequence[ModelName] | None = None,
        drafters: int | None = None,
        ranks: int | None = None,
        policy: ModelName | None = None,
        settings: Sequence[str] = (),
        dtype: str = AUTO,
        context: int = 0,
        timeout_s: float = 120.0,
        comm: MPI.Intracomm | None = None,
        trace: ModelName | None = None,
        calibration: ModelName | None = None,
        forced_acceptance: float | Sequence[float] = (),
        random_weights: bool = False,
        numerics: str = NUMERICS[0],
        activations: str = ACTIVATIONS[0],
        threads: int | None = None,
        tp: int = 1,
        stages: int | None = None,
        fused: str = FUSED[0],
        max_num_seqs: int = MAX_NUM_SEQS,
        kv_memory: int | str = 0,
        weights_memory: int | str = 0,
        prefix_caching: bool = True,
        tokenizer: ModelName | None = None,
        check: Callable[[Engine], object] | None = None,
    ) -> None:
        self._world = open_world(comm)
        size = self._world.size if self._world else 1 if ranks is None else ranks

        def configure() -> Config:
            named = model_name(target, "target")
            drafts = draft_names(named, draft, drafters)
            usual = "continuous" if size > 1 or draft or drafts else "plain"
            knobs = read_policy(_name(policy) if policy else usual, settings).settings()
            return Config(
                target=named, drafts=drafts, policy=knobs, dtype=dtype, context=context,
                timeout_s=timeout_s, trace=None if trace is None else _name(trace),
                calibrations={} if calibration is None else read_calibrations(_name(calibration)),
                forced_acceptance=_shares(forced_acceptance), random_weights=random_weights, numerics=numerics,
                activations=activations, threads=threads, tp=tp, stages=stages, fused=fused, max_num_seqs=max_num_seqs,
                kv_memory=byte_count(kv_memory, "kv_memory"), prefix_caching=prefix_caching,
                tokenizer=None if tokenizer is None else model_name(tokenizer, "tokenizer"),
                weights_memory=byte_count(weights_memory, "weights_memory"),
            )  # fmt: skip

        def prepare() -> Cleared:
            if ranks not in (None, size):
                refuse(f"--ranks {ranks}, but the launcher started {size}", "leave out --ranks under mpirun or srun")
            return self._cleared(configure(), size, check)

        if self._world is not None:
            self._join(self._world, timeout_s, configure, prepare)
        else:
            cleared = prepare()  # spawned ranks resolve the dtypes themselves, together
            self._head = spawn_job(self._asked, size) if size > 1 else lead_job(load_job(cleared))

    def _cleared(self, config: Config, size: int, check: Callable[[Engine], object] | None) -> Cleared:
        """On the head: ``config``, checked for ``size`` ranks and by ``check``. Raises UserError."""
        self._asked = config
        cleared = clear(config, size, self._world.has_kernels if self._world else None)
        self.config = cleared.config
        self._builder = builder = RequestBuilder(self.config, cleared)
        self.context, self.sampling, self.ignored = builder.context, builder.sampling, builder.ignored
        if check is not None:
            check(self)
        return cleared

    def _join(
        self, world: World, timeout_s: float, configure: Callable[[], Config], prepare: Callable[[], Cleared]
    ) -> None:
        """Be a rank of ``world``: the head checks everything before anything is loaded, the others learn the verdict
        and check what their hosts have; then all load. Whatever fails on one rank ends all. Raises UserError, all ranks
        alike, where the head refuses."""
        problem: UserError | None = None
        self._take_back = end_in_order()
        with world.guard():
            rendezvous = world.rendezvous(timeout_s)
            if world.is_head:
                try:
                    with rendezvous.busy("checking"):
                        cleared = prepare()
                except UserError as error:
                    problem = error
            if world.agree(problem is not None, rendezvous.poll):
                problem = problem or RefusedElsewhere("rank 0 says why")
        if problem is not None:
            self._take_back()
            raise problem
        with world.guard():
            if not world.is_head:
                with rendezvous.busy("checking"):
                    cleared = clear(configure(), world.size, world.has_kernels)
                    self.config = cleared.config
            self._job = load_job(cleared, world, rendezvous)
        if world.is_head:
            self._head = lead_job(self._job, world)
            atexit.register(self._left_open)

    @property
    def is_head(self) -> bool:
        """Whether this process submits requests."""
        return self._world is None or self._world.is_head

    @property
    def ranks(self) -> list[dict[str, Any]]:
        """Each rank's host, roles, layers, weight bytes and threads, as the head knows them."""
        return self._open().ranks

    @property
    def is_threaded(self) -> bool:
        """Whether other threads than the one that opened the engine may wait for answers (some MPI allow none)."""
        return self._open().is_threaded

    @property
    def failure(self) -> BaseException | None:
        """What has ended the job early, if something has; an engine that is idle learns it here."""
        return None if self._head is None else self._head.failure

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
        priority: int = 0,
        grammar: str | Mapping[str, Any] = "",
    ) -> Handle:
        """Have ``prompt`` (text, or token ids) decoded; from any thread. Up to ``max_num_seqs`` requests are decoded at
        once. Of those that wait, the ones with the lowest ``priority`` come first, then those that came first.

        ``sampling``: None for what the model's generation_config.json says, greedy if it says nothing. ``stop``:
        strings before the first of which the text ends, or special tokens; ``tokens`` then ends with the one that
        completed it. ``max_new_tokens`` may be 0 where ``sampling`` has ``prompt_logprobs``. ``grammar``: what the
        answer must follow: a JSON schema, or the text of a grammar as core.grammar makes it, instead of the one in
        ``sampling``. ``watch``: called with all that the job tells, by whoever takes the pieces.
        Raises UserError for what cannot be served."""
        job = self._open()
        assert self._builder is not None
        if grammar:
            text = grammar if isinstance(grammar, str) else schema_grammar(grammar)
            sampling = replace(self.sampling if sampling is None else sampling, grammar=text)
        built = self._builder.build(prompt, max_new_tokens, ignore_eos, chat, sampling, stop, priority)
        config, forced = asdict(self.config) | built.settings(), bool(self.config.forced_acceptance)
        tokens = list(built.request.prompt)
        answer = Completion(prompt_tokens=tokens, config=config, ranks=job.ranks, meaningless=forced)
        return Handle(job, built.request, self._builder.reader(built), answer, watch)

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
        return _stream(self.submit(prompt, max_new_tokens, ignore_eos, chat, sampling, stop))

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

        assert self._builder is not None
        built = self._builder.build(prompt, max_new_tokens, ignore_eos, False, sampling, stop)
        config = replace(self.config, policy=PLAIN.settings(), drafts=(), context=self.context, trace=None)
        config = replace(config, draft_dtypes=(), tp=1, stages=None, max_num_seqs=1, kv_memory=0)
        config = replace(config, weights_memory=config.weights_memory * len(self.ranks))
        job = LocalJob(load_job(clear(config, 1)), is_threaded=False)
        try:
            return Handle(job, built.request, self._builder.reader(built), Completion()).result().tokens
        finally:
            job.close()

    def tokenize(self, prompt: Prompt, max_new_tokens: int, chat: bool = False) -> list[int]:
        """The prompt's tokens. Raises UserError for a prompt that cannot be served."""
        assert self._builder is not None
        return self._builder.tokenize(prompt, max_new_tokens, chat)

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of a conversation under the tokenizer's chat template, up to where the assistant answers. Each
        message has a ``role`` and a ``content``. Raises UserError where there is no template, or it takes them not."""
        assert self._builder is not None
        return self._builder.tokenize_chat(messages)

    def check_grammar(self, grammar: str) -> None:
        """Raise UserError if an answer cannot follow ``grammar``, a text as for submit."""
        assert self._builder is not None
        self._builder.check_grammar(grammar)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, special tokens left out."""
        assert self._builder is not None
        return self._builder.decode(tokens)

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


def _shares(forced_acceptance: float | Sequence[float]) -> tuple[float, ...]:
    """The probability that a draft's first choice is right, or those of its first, second, ..., as the last."""
    given = forced_acceptance if isinstance(forced_acceptance, Sequence) else (forced_acceptance,)
    return tuple(map(float, given))


def _name(given: ModelName) -> str:
    """A name that a program gave, which may be a path."""
    try:
        return os.fsdecode(given)
    except TypeError:
        refuse(f"{given!r} is no name of a file or directory", "give text or a path")
