"""The end of a process after an error: one message, the right exit code, and the end of the whole job."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import time
import traceback

from launch.drain_stderr import let_it_be_read
from launch.environment import launched
from pipeinfer.core.errors import PipeinferError, Terminated, UserError, exit_code, origin

SIGNALLED_S = 1.3
"""A rank waits so long before it takes a signal for its own affair. A launcher that ends a job signals all ranks, and
kills them a second later: by then the rank that failed has reported it, or else rank 0, which waits for half a
second less, does."""


def leave(error: BaseException) -> int:
    """Report ``error`` once and return the exit code; where this process is a rank of an MPI job, end the job with it.

    A UserError is one line from rank 0, and every rank leaves by itself: all ranks have the error."""
    launch, error = launched(), origin(error)
    if isinstance(error, UserError):
        if not error.is_told and (launch is None or launch.leads):
            write(f"pipeinfer: {error}")
        return exit_code(error)
    report(error, rank=launch.rank if launch is not None and launch.size > 1 else None)
    mpi = sys.modules.get("launch.mpi")  # MPI cannot run without it
    if mpi is not None:
        mpi.abort(exit_code(error))
    return exit_code(error)


def report(error: BaseException, rank: int | None = None) -> None:
    """Write to standard error what ended this process, ``rank`` of a job or None: expected errors in one line, others
    with their traceback, and nothing where another process has reported the error."""
    if isinstance(error, PipeinferError):
        if not error.is_told:
            write(f"pipeinfer: {error}")
    elif isinstance(error, KeyboardInterrupt | Terminated | SystemExit):
        if rank is not None:
            if not isinstance(error, SystemExit):
                launch = launched()
                time.sleep(SIGNALLED_S if launch is not None and launch.leads else SIGNALLED_S + 0.5)
            write(f"pipeinfer: {in_a_line(error, rank)}, and the job with it")
    else:
        who = "an unforeseen error" if rank is None else f"{_name(rank)} failed"
        cause = "".join(traceback.format_exception(error)).rstrip()
        write(f"pipeinfer: {who}; please report this:\n{cause}")


def in_a_line(error: BaseException, rank: int) -> str:
    """What ended ``rank``, for others to know."""
    if isinstance(error, PipeinferError):
        return str(error)
    if isinstance(error, KeyboardInterrupt | Terminated | SystemExit):
        return f"{_name(rank)} {_asked(error)}"
    return f"{_name(rank)} failed ({type(error).__name__}: {error})"


def _name(rank: int) -> str:
    return f"rank {rank} on {socket.gethostname()}"


def _asked(error: BaseException) -> str:
    """How this process was asked to end."""
    if isinstance(error, Terminated):
        return f"was ended by {signal.Signals(error.signum).name}"
    if isinstance(error, SystemExit):
        return f"left with exit code {exit_code(error)}"
    return "was interrupted"


def write(line: str) -> None:
    """``line`` on standard error, at once, where there still is one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(line, file=sys.stderr, flush=True)
        let_it_be_read(sys.stderr)
