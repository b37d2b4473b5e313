"""Peers: other implementations that decode the same weights on this host, for measurements beside ours.

``hf`` is transformers' generate. ``hf-assisted`` is its assisted generation as it is by default: 20 tokens of the
draft, or fewer where it is unsure (what that means is adapted where scikit-learn is installed). ``hf-assisted-N``:
always N. ``llama.cpp`` and ``llama.cpp-assisted-N`` are llama.cpp on the same weights, exported to GGUF, or on the same
GGUF files; without a number it takes the length from 2 to 8 that is fastest on the first prompt. All are greedy and go
on after an end-of-text token. In 16 bits their tokens may differ from each other's and from ours, as those of any two
ways to batch do; llama.cpp's always may, as its keys and values are fp16 and its activations 8 bits for what is
quantised.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeinfer.core.config import DTYPES, model_directory
from pipeinfer.core.errors import refuse
from stages.checkpoint.folder import is_gguf_name

if TYPE_CHECKING:
    import torch

NAME = re.compile(r"(hf|llama\.cpp)(-assisted(?:-([1-9]\d*))?)?")


class Peer(Protocol):
    """An implementation with its models loaded."""

    name: str

    @property
    def facts(self) -> dict[str, Any]:
        """Which library it is, and what it has chosen."""
        ...

    def generate(self, prompt: list[int], count: int) -> tuple[list[int], list[tuple[float, int]], float]:
        """Exactly ``count`` tokens after ``prompt``; the time of each emission and how many tokens it was; and when the
        request began (monotonic seconds)."""
        ...


def is_peer(name: str) -> bool:
    """Whether ``name`` is a peer's."""
    return NAME.fullmatch(name) is not None


def may_differ(name: str, dtype: str) -> bool:
    """Whether the tokens of policy or peer ``name`` may be others than ours without a fault of ours."""
    return is_peer(name) and (name.startswith("llama.cpp") or dtype != "fp32")


def check_peers(names: Iterable[str]) -> None:
    """Raise UserError where one of ``names`` needs a package that is missing."""
    if any(is_peer(name) and name.startswith("llama.cpp") for name in names):
        from pipeinfer.bench.llama_cpp import require

        require()


def open_peer(
    name: str, target: str | Path, draft: str | Path | None, dtype: str, threads: int, draft_dtype: str = ""
) -> Peer:
    """The peer ``name`` with its models loaded: directories, or ``builtin``; the draft in ``dtype`` too, if not in
    ``draft_dtype``. From now on torch has ``threads`` threads in this process. Raises UserError for a peer that is
    none, or that cannot be had as asked."""
    found = NAME.fullmatch(name)
    if not found:
        refuse(f"unknown peer {name!r}", "use hf or llama.cpp, with -assisted or -assisted-N or without")
    if dtype not in DTYPES:
        refuse(f"unknown dtype {dtype!r}", f"use one of {', '.join(DTYPES)}")
    library, is_assisted, length = found[1], found[2] is not None, int(found[3] or 0)
    if is_assisted and draft is None:
        refuse(f"{name} without a draft model", f"name one, or use {library}")
    places = [model_directory(str(target), "target"), *([model_directory(str(draft), "draft")] if is_assisted else [])]
    if library == "llama.cpp":
        from pipeinfer.bench.llama_cpp import LlamaCppPeer

        return LlamaCppPeer(name, places[0], places[1] if is_assisted else None, dtype, threads, length)
    import torch

    torch.set_num_threads(threads)
    model = load_transformers(places[0], dtype)
    assistant = load_transformers(places[1], draft_dtype or dtype) if is_assisted else None
    if assistant is not None and length:
        assistant.generation_config.num_assistant_tokens = length
        assistant.generation_config.assistant_confidence_threshold = 0.0
    return TransformersPeer(name, model, assistant)


def load_transformers(directory: Path, dtype: str) -> Any:
    """transformers' model in ``directory``, which never ends a text by itself. Raises UserError where there is none."""
    if is_gguf_name(directory):
        refuse(f"transformers beside the GGUF file {directory}", "use llama.cpp: it computes with the same weights")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from stages.models.pair import DTYPES as TORCH_DTYPES

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # Assisted generation warns of how it calls generate itself.
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=TORCH_DTYPES[dtype],
            attn_implementation="sdpa",
            local_files_only=True,
        )
    except (OSError, ValueError) as error:
        refuse(f"transformers cannot load {directory} ({str(error).splitlines()[0]})", "name a model that it knows")
    model.generation_config.eos_token_id = None
    return model


class TransformersPeer:
    """transformers' generate of ``model``, assisted by ``assistant`` if there is one."""

    def __init__(self, name: str, model: Any, assistant: Any | None) -> None:
        self.name = name
        self._model = model
        self._assistant = assistant

    @property
    def facts(self) -> dict[str, Any]:
        """See Peer."""
        return {"library": f"transformers {metadata.version('transformers')}"}

    def generate(self, prompt: list[int], count: int) -> tuple[list[int], list[tuple[float, int]], float]:
        """See Peer."""
        import torch

        watch = _Watch()
        tokens = torch.tensor([prompt])
        found = self._model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=count,
            assistant_model=self._assistant,
            streamer=watch,
        )
        return found[0, len(prompt) :].tolist(), watch.emitted_at, watch.began_at


class _Watch:
    """A streamer that only looks at the clock; the first it is given is the prompt."""

    def __init__(self) -> None:
        self.began_at = time.monotonic()
        self.emitted_at: list[tuple[float, int]] = []
        self._is_prompt = True

    def put(self, tokens: torch.Tensor) -> None:
        """Called by transformers with tokens as they become final."""
        if not self._is_prompt:
            self.emitted_at.append((time.monotonic(), tokens.numel()))
        self._is_prompt = False

    def end(self) -> None:
        """Called by transformers after the last token."""
