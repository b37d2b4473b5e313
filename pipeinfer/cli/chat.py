"""``pipeinfer chat``: a conversation in a terminal, or with a script."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from pipeinfer.cli.conversation import Conversation, refuse_no_template
from pipeinfer.cli.run import (
    Progress,
    add_execution,
    add_models,
    add_sampling,
    note,
    open_engine,
    read_sampling,
    refuse_half_a_pair,
    refuse_no_timeout,
)
from pipeinfer.core.errors import PipeinferError, UserError, refuse

if TYPE_CHECKING:
    from pipeinfer.engine.answer import Completion, Handle
    from pipeinfer.engine.engine import Engine

COMMAND = re.compile(r"/[a-z]+\s*")
HELP = """/reset  forget the conversation
/help   show these commands
/quit   end (also Ctrl-D)
Ctrl-C stops an answer. A line that ends with a backslash goes on in the next one."""
PROMPT, GOES_ON = "> ", ". "
DIM, UNDIM = "\x1b[2m", "\x1b[0m"
REPEATED_S = 3.0
"""A second Ctrl-C so much later than the first means the program: the answer cannot be stopped."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser's ``commands``."""
    parser = commands.add_parser(
        "chat",
        help="talk with a model in a terminal",
        description="Read lines from the terminal and stream the model's answers. If standard input is no terminal, "
        "each of its lines is a turn. Under mpirun or srun the job's ranks are used, and rank 0 talks; otherwise "
        "--ranks N starts N ranks on this machine.\n",
    )
    parser.set_defaults(command=chat, prefix_caching=True)  # a turn begins with all turns before
    add_models(parser.add_argument_group("models"))
    what = parser.add_argument_group("conversation")
    what.add_argument("--system", default="", metavar="TEXT", help="the system message")
    what.add_argument(
        "--no-template",
        action="store_true",
        help="no chat template: the conversation is one plain text, as a model without a template needs it",
    )
    what.add_argument(
        "--max-new-tokens", type=int, metavar="K", help="stop an answer after K tokens (default: the context's end)"
    )
    what.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end an answer before the first TEXT (repeatable)"
    )
    add_sampling(parser.add_argument_group("sampling"))
    add_execution(parser.add_argument_group("execution"))


def chat(args: argparse.Namespace) -> int:
    """Talk as ``args`` say."""
    refuse_half_a_pair(args)
    refuse_no_timeout(args)
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        refuse(f"--max-new-tokens {args.max_new_tokens}", "use at least 1")
    from launch.collector import frozen
    from pipeinfer.core.sampling import checked_stops

    read_sampling(args)
    checked_stops(args.stop)

    def check(engine: Engine) -> None:
        if not args.no_template:
            refuse_no_template(engine, args.system)

    with Progress("loading the models"):
        opened = open_engine(args, check, policy=args.policy, timeout_s=args.timeout, trace=args.trace)
    with frozen(), opened as engine:
        if engine is not None:
            conversation = Conversation(engine, not args.no_template, args.system)
            talk(args, engine, conversation, is_terminal=sys.stdin.isatty())
    return 0


def talk(args: argparse.Namespace, engine: Engine, conversation: Conversation, is_terminal: bool) -> None:
    """Answer turn after turn. Raises UserError for a turn that cannot be answered, unless a person is there to read
    the message."""
    sampling = read_sampling(args, engine.sampling)
    if is_terminal:
        say("/help shows the commands, Ctrl-D ends")
    for turn in turns(is_terminal):
        if COMMAND.fullmatch(turn):
            if turn.strip() == "/quit":
                return
            obey(turn.strip(), conversation)
            continue
        try:
            tokens, most_new = conversation.prompt(turn, args.max_new_tokens)
            handle = engine.submit(tokens, most_new, sampling=sampling, stop=args.stop)
            answer = show(handle)
        except PipeinferError as error:
            if engine.failure is not None or not is_terminal:
                raise
            note(f"pipeinfer: {error}")
            continue
        conversation.add(turn, answer.text)
        if sys.stderr.isatty():
            say(in_words(answer))


def turns(is_terminal: bool) -> Iterator[str]:
    """What the user says, until the end of standard input. Ctrl-C at a terminal forgets the line."""
    read = asking() if is_terminal and sys.stdout.isatty() else reading
    while True:
        try:
            turn = read(PROMPT)
            while turn is not None and turn.endswith("\\"):
                more = read(GOES_ON)
                turn = turn[:-1] + "\n" + (more or "")
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print(flush=True)
            continue
        except UnicodeDecodeError as error:
            told = UserError(f"standard input is not UTF-8 text (byte {error.start} of a line); convert it")
            if not is_terminal:
                raise told from None
            note(f"pipeinfer: {told}")
            continue
        if turn is None:
            return
        if turn.strip():
            yield turn


def asking() -> Callable[[str], str | None]:
    """Reads a line from a person, who can edit it where Python has readline."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() uses it

    def read(prompt: str) -> str | None:
        try:
            return input(prompt)
        except EOFError:
            print(flush=True)
            return None

    return read


def reading(prompt: str) -> str | None:
    """The next line of standard input; None at its end."""
    line = sys.stdin.buffer.readline()
    return line.decode().rstrip("\r\n") if line else None


def obey(command: str, conversation: Conversation) -> None:
    """Do what a line like /help says."""
    if command == "/reset":
        conversation.reset()
        say("the conversation is forgotten")
    elif command == "/help":
        say(HELP)
    else:
        say(f"there is no {command}; /help shows the commands")


def show(handle: Handle) -> Completion:
    """Stream the answer to its end, or to where Ctrl-C stops it. Raises what has ended it early."""
    with stopped_by_interrupt(handle):
        try:
            for piece in handle:
                print(piece, end="", flush=True)
            return handle.result()
        except BaseException as error:
            handle.interrupt(error)
            raise
        finally:
            print(flush=True)


@contextlib.contextmanager
def stopped_by_interrupt(handle: Handle) -> Iterator[None]:
    """At a terminal Ctrl-C cancels the answer while the ``with`` lasts."""
    asked_s: float | None = None

    def asked(signum: int, frame: FrameType | None) -> None:
        nonlocal asked_s
        now = time.monotonic()
        if asked_s is None:
            asked_s = now
            handle.cancel()
        elif now - asked_s > REPEATED_S:
            raise KeyboardInterrupt

    if not sys.stdin.isatty():
        yield
        return
    before = signal.signal(signal.SIGINT, asked)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def say(text: str) -> None:
    """Tell on standard error what is not the model's; dimly on a terminal."""
    note(f"{DIM}{text}{UNDIM}" if sys.stderr.isatty() else text)


def in_words(answer: Completion) -> str:
    """How fast an answer came."""
    if not answer.metrics:
        return "stopped before the first token"
    metrics = answer.metrics
    stopped = "stopped; " if answer.finish_reason == "cancelled" else ""
    return (
        f"{stopped}{len(answer.tokens)} tokens, {metrics['output_throughput']:.1f} tokens/s, "
        f"TTFT {metrics['ttft_ms']:.0f} ms, acceptance rate {metrics['acceptance_rate']:.2f}, "
        f"accept length {metrics['accept_length']:.2f}"
    )
