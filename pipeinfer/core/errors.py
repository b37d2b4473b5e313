"""What can go wrong, by whose fault it is; the command line turns each into one line and an exit code."""

from __future__ import annotations

from typing import ClassVar, NoReturn


class PipeinferError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1
    is_told = False
    """Whether another process has already printed it on standard error."""


class UserError(PipeinferError):
    """The request cannot be served as it was asked; the message names the thing and the fix."""

    exit_code = 2


class CheckpointError(UserError):
    """A model directory is missing, damaged, or of an architecture that is not supported."""


class LocalProtocolError(PipeinferError):
    """A machine of ours was asked for the impossible: a defect on this side."""


class RemoteProtocolError(PipeinferError):
    """A message cannot be what a correct peer would have sent."""


class StallError(PipeinferError):
    """Nothing moved for longer than the deadline allows; the message names who waits for whom."""

    exit_code = 3


class NotFiniteError(PipeinferError):
    """The model's numbers are not finite where an answer depends on them; the message names layer and rank."""


class RankFailed(PipeinferError):
    """Another rank has failed, reports why, and ends the job with exit code ``code``."""

    is_told = True

    def __init__(self, who: str, code: int) -> None:
        super().__init__(f"the rank of {who} has failed")
        self.exit_code = code


class Terminated(BaseException):
    """A signal asked this process to end (SIGTERM, SIGHUP); as KeyboardInterrupt, nothing but the top catches it.

    ``raised``: the one that was raised last. A library may turn it into an error of its own that does not name it."""

    raised: ClassVar[Terminated | None] = None

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def origin(error: BaseException) -> BaseException:
    """The signal that led to ``error``, if one did: Python wraps what is raised where a class is made, and whatever is
    interrupted may raise an error of its own."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, KeyboardInterrupt | Terminated):
        found = found.__cause__ or found.__context__
    return found or Terminated.raised or error


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ``error`` ends, 0 to 255."""
    if isinstance(error, PipeinferError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, Terminated):
        return 128 + error.signum
    if isinstance(error, SystemExit):
        return error.code & 0xFF if isinstance(error.code, int) else int(error.code is not None)
    return 1


def refuse(thing: str, fix: str) -> NoReturn:
    """Raise a UserError whose message has two parts: what is wrong, and what to do about it."""
    raise UserError(f"{thing}; {fix}")
