"""The output file of a batch: whole lines only, to which a later batch appends what is missing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from pathlib import Path
from typing import NoReturn

from pipeinfer.cli.batch_lines import MAX_LINE_NBYTES, OUTPUT_BEGINS
from pipeinfer.core.errors import PipeinferError, refuse

SYNC_S = 5.0
"""Every line is handed to the system at once, so that it outlives this process. It is forced to the disk as often as
this, and at the end: a node that loses power loses the lines of so many seconds, which are then decoded again."""
MOST_ANSWER_NBYTES = 16 * MAX_LINE_NBYTES
"""A longer line is none of ours."""


class BatchOutput:
    """Appends lines to the file at ``path``, which is made if it is missing, and made whole: a torn last line is cut
    off. ``answered``: the custom_ids of the lines that it has. Raises UserError for a file that cannot be written, that
    another process writes, or that holds something else than answers.

    To be closed; a file that this object made and that is still empty then goes away after an error."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.answered = set[str]()
        self._is_new = not os.path.lexists(self.path)
        self._synced_at = time.monotonic()
        try:
            # Not blocking: a pipe without a reader would be waited for. 0666: what the umask leaves of it.
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        except OSError as error:
            refuse(f"{path} cannot be written ({error.strerror})", "name a file in a directory of yours with --out")
        try:
            self._take()
        except BaseException:
            self.close(is_failed=True)
            raise

    def _take(self) -> None:
        """Lock the file, read its ids, and go to the end of its last whole line."""
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            refuse(f"{self.path} is no regular file", "name another one with --out")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            refuse(f"{self.path} is being written by another process", "wait for its end, or name another file")
        except OSError:
            pass  # a file system without locks
        self._size = self._read_answered()
        os.ftruncate(self._file, self._size)
        os.lseek(self._file, self._size, os.SEEK_SET)

    def _read_answered(self) -> int:
        """Read the ids; the length of the whole lines in bytes. Refuses a file whose torn line is not of our kind."""
        size = number = 0
        with open(os.dup(self._file), "rb") as file:
            while line := file.readline(MOST_ANSWER_NBYTES):
                number += 1
                if not line.endswith(b"\n"):
                    shorter = min(len(line), len(OUTPUT_BEGINS))
                    if line[:shorter] != OUTPUT_BEGINS[:shorter] or len(line) == MOST_ANSWER_NBYTES:
                        self._refuse(number)
                    break
                self.answered.add(self._id_in(line, number))
                size += len(line)
        return size

    def _id_in(self, line: bytes, number: int) -> str:
        try:
            found = json.loads(line)
            if isinstance(found["custom_id"], str) and "response" in found:
                return str(found["custom_id"])
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        self._refuse(number)

    def _refuse(self, number: int) -> NoReturn:
        refuse(f"{self.path} holds no answers of a batch (line {number})", "name another file with --out")

    def append(self, line: bytes) -> None:
        """Write ``line``, whole or not at all. Raises PipeinferError where that cannot be, as on a full disk."""
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
                os.lseek(self._file, self._size, os.SEEK_SET)
            raise self._lost(error) from None
        self._size += len(line)
        if time.monotonic() - self._synced_at > SYNC_S:
            self._sync()

    def _sync(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EROFS):  # a file system that has no such call
                raise self._lost(error) from None
        self._synced_at = time.monotonic()

    def _lost(self, error: OSError) -> PipeinferError:
        return PipeinferError(f"{self.path} cannot be written ({error.strerror}); the same command goes on from here")

    def close(self, is_failed: bool = False) -> None:
        """Force what was written to the disk, and let the file go."""
        try:
            with contextlib.suppress(PipeinferError) if is_failed else contextlib.nullcontext():
                self._sync()
            if is_failed and self._is_new and not os.fstat(self._file).st_size:
                self.path.unlink(missing_ok=True)
        finally:
            os.close(self._file)

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(is_failed=kind is not None)
