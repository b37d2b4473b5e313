"""What can go wrong, by whose fault it is; the command line turns each into one line and an exit code."""

from typing import NoReturn


class PipeinferError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


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
    """Nothing moved for longer than the deadline allows; the message says who waits for whom."""

    exit_code = 3


def refuse(thing: str, fix: str) -> NoReturn:
    """Raise a UserError in the house's form: what is wrong, then what to do about it."""
    raise UserError(f"{thing}; {fix}")
