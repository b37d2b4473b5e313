"""Whether equal requests have equal answers."""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_EXAMPLES = 5
AROUND = 40  # characters shown before and after the place where two texts part


@dataclass(slots=True)
class Repeats:
    """The longest text of each distinct request so far. ``compared``: texts that were compared with an earlier one;
    ``differences``: those that were not equal to it, or, of aborted requests, no beginning of it."""

    compared: int = 0
    differences: int = 0
    examples: list[str] = field(default_factory=list)
    _known: dict[int, tuple[str, bool]] = field(default_factory=dict)

    def check(self, key: int, text: str, is_whole: bool) -> None:
        """Request ``key`` was answered with ``text``, to its end or not."""
        if key not in self._known:
            self._known[key] = text, is_whole
            return
        known, is_known_whole = self._known[key]
        self.compared += 1
        length = min(len(text), len(known))
        is_longer = (is_known_whole and len(text) > length) or (is_whole and len(known) > length)
        is_same = text[:length] == known[:length] and not is_longer
        if not is_same:
            self.differences += 1
            if len(self.examples) < MOST_EXAMPLES:
                self.examples.append(_example(key, known, text))
        elif (is_whole, len(text)) > (is_known_whole, len(known)):
            self._known[key] = text, is_whole


def _example(key: int, known: str, text: str) -> str:
    """Where two texts part."""
    pairs = zip(known, text, strict=False)
    place = next((at for at, (mine, theirs) in enumerate(pairs) if mine != theirs), min(len(known), len(text)))
    before, after = max(0, place - AROUND), place + AROUND
    return f"request {key}, character {place}: {known[before:after]!r}, then {text[before:after]!r}"
