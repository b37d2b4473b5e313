"""Make the items of our lm-eval task from the text of this repository: the last word of a line of Python.

python -m benchmarks.clients.make_items > benchmarks/clients/lm_eval/items.jsonl

The prompt is the rest of that line after the lines before it. The items in the repository are those of one commit: made
again, later, they differ.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ITEMS, SEED = 40, 1
LINES_BEFORE = 20
END = re.compile(r"(.*\w)([^\w]+\w+\W*)")
"""The beginning of a line, and its last word."""


def items(text: str) -> Iterator[dict[str, str]]:
    """All items in the source ``text``: lines that came a few lines before, too."""
    lines = text.splitlines()
    for index in range(LINES_BEFORE, len(lines)):
        before = lines[index - LINES_BEFORE : index]
        if lines[index] in before and (found := END.fullmatch(lines[index])):
            yield {"prompt": "\n".join([*before, found[1]]), "target": found[2]}


if __name__ == "__main__":
    texts = [path.read_text() for path in sorted((ROOT / "pipeinfer").rglob("*.py"))]
    found = {item["prompt"].rpartition("\n")[2]: item for text in texts for item in items(text)}
    for item in random.Random(SEED).sample(list(found.values()), ITEMS):
        sys.stdout.write(json.dumps(item) + "\n")
