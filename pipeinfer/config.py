"""What a job was asked to be; every rank builds the same one from the same words."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeinfer.protocol import VERSION

BUILTIN = "builtin"
DTYPES = ("fp32", "bf16")


@dataclass(frozen=True, slots=True)
class Config:
    """``target`` and ``draft`` are directories in Hugging Face format, or ``builtin``. ``context``: most tokens of a
    request, prompt included (0: what the target was made for, at most DEFAULT_CONTEXT). ``timeout_s``: how long nothing
    may move before the job gives up and says who waits for whom (0: for ever)."""

    target: str = BUILTIN
    draft: str | None = BUILTIN
    policy: str = "continuous"
    dtype: str = "fp32"
    context: int = 0
    timeout_s: float = 120.0

    def digest(self) -> int:
        """A number that ranks compare at HELLO: they must mean the same job and speak the same protocol."""
        return zlib.crc32(json.dumps([VERSION, asdict(self)], sort_keys=True).encode())

    @property
    def target_directory(self) -> Path:
        """Where the target's files are."""
        return model_directory(self.target, "target")

    @property
    def draft_directory(self) -> Path | None:
        """Where the draft's files are, if there is one."""
        return None if self.draft is None else model_directory(self.draft, "draft")


DEFAULT_CONTEXT = 4096
"""Most tokens of a request unless ``context`` says more: cells for a whole long context are paid for even if unused."""


def model_directory(name: str, part: str) -> Path:
    """The directory that ``name`` means; ``part`` is ``target`` or ``draft``."""
    return Path(__file__).parent / BUILTIN / part if name == BUILTIN else Path(name)
