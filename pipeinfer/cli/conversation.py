"""A conversation with a model: what was said so far, and the prompt that it makes with the next turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeinfer.core.errors import UserError, refuse

if TYPE_CHECKING:
    from pipeinfer.engine.engine import Engine


class Conversation:
    """Turns of a user and answers of the model of ``engine``. ``system``: the system message, if not empty.

    ``has_template``: the whole conversation goes through the chat template each turn; otherwise it is one text, in
    which turns and answers follow each other, each on a line of its own."""

    def __init__(self, engine: Engine, has_template: bool, system: str = "") -> None:
        self._engine, self._has_template, self._system = engine, has_template, system
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self._messages = [{"role": "system", "content": self._system}] if self._system and self._has_template else []
        self._text = _as_line(self._system)

    def prompt(self, turn: str, most_new: int | None) -> tuple[list[int], int]:
        """The tokens of the conversation with the user's ``turn``, and how many new ones may follow: ``most_new``, or
        what is left of the context. Raises UserError if nothing is left, or if the template does not take it."""
        if self._has_template:
            tokens = self._engine.tokenize_chat([*self._messages, {"role": "user", "content": turn}])
        else:
            tokens = self._engine.tokenize(self._text + _as_line(turn), 1)
        room = self._engine.context - len(tokens)
        if room < 1:
            refuse(f"the conversation fills the context of {self._engine.context} tokens", "/reset begins a new one")
        return tokens, room if most_new is None else min(room, most_new)

    def add(self, turn: str, answer: str) -> None:
        """``answer`` is what the model said to ``turn``."""
        self._messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        self._text += _as_line(turn) + _as_line(answer)


def _as_line(text: str) -> str:
    return text if not text or text.endswith("\n") else text + "\n"


def refuse_no_template(engine: Engine, system: str) -> None:
    """Raise UserError where the model has no chat template, or one that cannot be used."""
    try:
        Conversation(engine, True, system).prompt("x", 1)
    except UserError as error:
        what = str(error).rpartition("; ")[0] or str(error)
        refuse(what, "say --no-template to talk in plain text, or name a model for chats with --target")
