"""Write the built-in pair as a pair for chats: with a chat template, and with the newlines as ends of an answer.

python -m benchmarks.clients.chat_pair DIR
pipeinfer serve --target DIR/target --draft DIR/draft --served-model-name builtin
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from pipeinfer.core.config import BUILTIN, model_directory

TEMPLATE = "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}# assistant: The"
NEWLINE = "\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}"  # how byte-level BPE spells it


def write(folder: Path) -> None:
    """Write the pair to the new directories ``folder``/target and ``folder``/draft."""
    for role in ("target", "draft"):
        shutil.copytree(model_directory(BUILTIN, role), folder / role)
        vocabulary = json.loads((folder / role / "tokenizer.json").read_text())["model"]["vocab"]
        ends = sorted(number for token, number in vocabulary.items() if token.startswith(NEWLINE))
        change(folder / role / "tokenizer_config.json", "chat_template", TEMPLATE)
        change(folder / role / "generation_config.json", "eos_token_id", ends)


def change(path: Path, name: str, value: Any) -> None:
    """Set one member of the JSON object in the file ``path``."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the built-in pair as a pair for chats.")
    parser.add_argument("folder", type=Path, help="where the directories target and draft go")
    write(parser.parse_args().folder)
