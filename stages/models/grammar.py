"""Which tokens a grammar allows next, by the llguidance library.

The mask of a row depends on the grammar and on the tokens generated before the drawn one, and on nothing else. So every
schedule, batch and placement has the same masks, and so has a sequence that begins again after preemption. What has
been computed is kept for a while: a row's state is usually a copy of its parent's, one token further."""

from __future__ import annotations

import importlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeinfer.core.errors import UserError, refuse

STATES = 128
"""States that are kept: a mask for a vocabulary of 152,000 tokens takes 152 KB."""
ROOTS = 16
"""Grammars that are kept."""
NEAR = 64
"""How many tokens back a state is looked for before the whole text is read again."""

Mask = npt.NDArray[np.bool_]


class _State(NamedTuple):
    """After some tokens: llguidance's matcher, which is copied but not moved on; None where it has failed."""

    matcher: Any
    mask: Mask


class Grammars:
    """The grammars of a model whose tokenizer is tokenizer.json in ``directory``. ``vocab_size``: of its logits.
    ``find_ends``: gives the tokens that end a text; ``find_folder``: the folder that has tokenizer.json, if it is
    another one. Everything is read when it is first needed."""

    def __init__(
        self,
        directory: Path,
        vocab_size: int,
        find_ends: Callable[[], Iterable[int]],
        find_folder: Callable[[], Path] | None = None,
    ) -> None:
        self._find_folder = find_folder or (lambda: directory)
        self._directory, self._vocab_size, self._find_ends = directory, vocab_size, find_ends
        self._states: OrderedDict[tuple[str, bytes], _State] = OrderedDict()
        self._roots: OrderedDict[str, Any] = OrderedDict()
        self._has_warned = False

    @cached_property
    def _ends(self) -> list[int]:
        return sorted({token for token in self._find_ends() if 0 <= token < self._vocab_size})

    @cached_property
    def _only_ends(self) -> Mask:
        mask = np.zeros(self._vocab_size, np.bool_)
        mask[self._ends] = True
        return mask

    @cached_property
    def _tokenizer(self) -> Any:
        """llguidance's. Raises UserError where there can be none."""
        try:
            llguidance = importlib.import_module("llguidance")
        except ImportError:
            refuse("a grammar needs the package llguidance", "pip install 'pipeinfer[guidance]' on all hosts")
        path = self._find_folder() / "tokenizer.json"
        if not self._ends:
            refuse(f"a grammar for {self._directory}, which has no token that ends a text", "use another model")
        try:
            text = path.read_text("utf-8")
            # With its default slices llguidance computes parts of masks beforehand; they change no mask.
            return llguidance.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._ends[0])
        except OSError as error:
            refuse(f"a grammar needs {path} ({error.strerror})", "use a model that has one")
        except Exception as error:  # of Rust, of any kind
            refuse(f"llguidance cannot use {path} ({_line(error)})", "use another model for this request")

    def check(self, grammar: str) -> None:
        """Raise UserError if ``grammar`` cannot be followed."""
        tokenizer = self._tokenizer
        matchers = importlib.import_module("llguidance").LLMatcher
        try:
            is_wrong, messages = matchers.validate_grammar_with_warnings(grammar, tokenizer)
        except Exception as error:  # of Rust, of any kind
            is_wrong, messages = True, [_line(error)]
        if is_wrong:
            refuse(f"llguidance refuses the grammar ({_line(' '.join(messages))})", "correct it")

    def mask(self, grammar: str, generated: npt.NDArray[np.int64]) -> Mask:
        """Which tokens may come after the tokens ``generated`` of an answer that follows ``grammar``: bool
        [vocabulary], not to be written to. Those that end a text alone, where the answer is complete, and where
        ``generated`` contradicts the grammar or the library fails."""
        key = grammar, generated.tobytes()
        state = self._states.get(key)
        if state is None:
            state = self._states[key] = self._reached(grammar, generated)
            if len(self._states) > STATES:
                self._states.popitem(last=False)
        else:
            self._states.move_to_end(key)
        return state.mask

    def _reached(self, grammar: str, generated: npt.NDArray[np.int64]) -> _State:
        try:
            start, matcher = self._nearest(grammar, generated)
            if matcher is not None:
                matcher = matcher.deep_copy()
                if not matcher.consume_tokens(generated[start:].tolist()):
                    return _State(None, self._only_ends)
                bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
                mask = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(np.bool_)
                if mask[self._ends[0]]:
                    mask[self._ends] = True  # llguidance knows one of them; any other one contradicts its grammar
                if mask.any() and not matcher.is_error():
                    return _State(matcher, mask)
        except Exception as error:  # of Rust, of any kind; it must not end the job
            self._warn(error)
        return _State(None, self._only_ends)

    def _nearest(self, grammar: str, generated: npt.NDArray[np.int64]) -> tuple[int, Any]:
        """A state that is known of the first tokens of ``generated``: how many, and its matcher, None if it failed."""
        for length in range(len(generated) - 1, max(-1, len(generated) - 1 - NEAR), -1):
            state = self._states.get((grammar, generated[:length].tobytes()))
            if state is not None:
                return length, state.matcher
        if grammar not in self._roots:
            tokenizer = self._tokenizer  # says what is missing
            self._roots[grammar] = importlib.import_module("llguidance").LLMatcher(tokenizer, grammar, log_level=0)
            if len(self._roots) > ROOTS:
                self._roots.popitem(last=False)
        self._roots.move_to_end(grammar)
        return 0, self._roots[grammar]

    def _warn(self, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            what = error if isinstance(error, UserError) else f"llguidance has failed ({_line(error)})"
            print(f"pipeinfer: {what}; answers that follow a grammar end early", file=sys.stderr, flush=True)


def _line(error: object) -> str:
    """What ``error`` says, as one line of bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + "..."
