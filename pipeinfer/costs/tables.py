"""Reading descriptions: TOML files whose numbers have sources. Every error message names the file and the key."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from pipeinfer.core.errors import refuse


class Table:
    """The keys and values of ``path``, or of the table ``within`` it."""

    def __init__(self, path: Path, words: Mapping[str, Any], within: str = "") -> None:
        self.path = path
        self.words = words
        self._within = within

    @classmethod
    def read(cls, path: Path) -> Table:
        """The file at ``path``. Raises UserError if the file is not TOML."""
        try:
            return cls(path, tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            refuse(f"{path} cannot be read ({error})", "correct it")

    def bad(self, key: str, what: str) -> NoReturn:
        """Refuse ``key`` because of ``what``."""
        refuse(f"{self.path}: {self._within}{key} {what}", "correct it")

    def only(self, known: Collection[str]) -> None:
        """Refuse any key that is not ``known``."""
        if odd := sorted(self.words.keys() - set(known)):
            self.bad(odd[0], f"is unknown; there are {', '.join(known)}")

    def get(self, key: str) -> Any:
        """The value at ``key``, which must exist."""
        if key not in self.words:
            self.bad(key, "is missing")
        return self.words[key]

    def table(self, key: str) -> Table:
        """The table at ``key``."""
        words = self.get(key)
        if not isinstance(words, dict):
            self.bad(key, f"must be a table, not {words!r}")
        return Table(self.path, words, f"{self._within}{key}.")

    def text(self, key: str, among: Collection[str] = ()) -> str:
        """The text at ``key``; one of ``among``, if given."""
        words = self.get(key)
        if not isinstance(words, str) or not words.strip() or (among and words not in among):
            self.bad(key, f"must be {' or '.join(among) or 'a text'}, not {words!r}")
        return words

    def flag(self, key: str) -> bool:
        """The truth value at ``key``."""
        value = self.get(key)
        if not isinstance(value, bool):
            self.bad(key, f"must be true or false, not {value!r}")
        return value

    def count(self, key: str) -> int:
        """The positive whole number at ``key``."""
        value = self.number(key)
        if value != int(value):
            self.bad(key, f"must be a whole number, not {value!r}")
        return int(value)

    def number(self, key: str) -> float:
        """The positive number at ``key``."""
        return self._positive(key, self.get(key))

    def numbers(self, key: str) -> tuple[float, ...]:
        """The positive numbers at ``key``, at least one."""
        values = self.get(key)
        if not isinstance(values, list) or not values:
            self.bad(key, f"must be a list of numbers, not {values!r}")
        return tuple(self._positive(key, value) for value in values)

    def _positive(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value < math.inf:
            self.bad(key, f"must be a positive number, not {value!r}")
        return float(value)
