"""The corpus: what is read and what is held out, its tokenizer, and batches of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.pair.plan import Plan

END_OF_TEXT = "<|endoftext|>"

# Parts of the library that hold tests, generated tables or other people's packages rather than ordinary source.
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "msilib", "__pycache__"}
)
SKIPPED_FILES = frozenset({"html/entities.py", "__phello__.py"})
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
HELD_OUT = frozenset(
    {
        "bisect.py",
        "calendar.py",
        "csv.py",
        "fractions.py",
        "getopt.py",
        "glob.py",
        "heapq.py",
        "html/parser.py",
        "json/decoder.py",
        "queue.py",
        "sched.py",
        "shlex.py",
        "statistics.py",
        "textwrap.py",
    }
)


@dataclass
class Corpus:
    """Source text of the library, by path relative to its root."""

    train: dict[str, str] = field(default_factory=dict)
    held_out: dict[str, str] = field(default_factory=dict)


def read_corpus(root: Path, max_files: int | None = None) -> Corpus:
    """Read the library's modules, split into training and held-out text."""
    corpus = Corpus()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if SKIPPED_FOLDERS & set(relative.parts) or name in SKIPPED_FILES:
            continue
        if any(part.startswith(SKIPPED_PREFIXES) for part in relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            (corpus.held_out if name in HELD_OUT else corpus.train)[name] = text
    missing = HELD_OUT - corpus.held_out.keys()
    if missing:
        raise SystemExit(f"held-out modules not found in the library: {sorted(missing)}")
    corpus.train = dict(list(corpus.train.items())[:max_files])
    return corpus


def byte_count(texts: dict[str, str]) -> int:
    """Give the size of all texts together in UTF-8."""
    return sum(len(text.encode("utf-8")) for text in texts.values())


def train_tokenizer(texts: dict[str, str], plan: Plan) -> Any:
    """Train a byte-level BPE tokenizer that gives back every text exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=plan.vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(texts.values()), trainer)
    wrapped: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=plan.context,
    )
    if len(wrapped) != plan.vocab:
        raise SystemExit(f"the tokenizer has {len(wrapped)} entries instead of {plan.vocab}")
    return wrapped


def encode(tokenizer: Any, texts: dict[str, str]) -> list[torch.Tensor]:
    """Encode each document, with the separator behind it, and check that it decodes to the same text."""
    documents = []
    for name, text in texts.items():
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        if tokenizer.decode(ids) != text:
            raise SystemExit(f"{name} does not survive encoding and decoding")
        documents.append(torch.tensor([*ids, tokenizer.eos_token_id], dtype=torch.long))
    return documents


def batches(documents: list[torch.Tensor], length: int, rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield (rows, length + 1) windows for ever, each epoch over a new order of documents and windows."""
    rng = random.Random(seed)
    while True:
        order = rng.sample(documents, len(documents))
        stream = torch.cat([order[0][rng.randrange(len(order[0])) :], *order[1:]])
        starts = list(range(0, len(stream) - length, length))
        if len(starts) < rows:
            raise SystemExit("the corpus is too small for one batch")
        rng.shuffle(starts)
        for first in range(0, len(starts) - rows + 1, rows):
            yield torch.stack([stream[start : start + length + 1] for start in starts[first : first + rows]])
