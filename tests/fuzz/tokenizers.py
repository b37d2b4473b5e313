"""Random tokenizers against transformers: the same tokens, and the same text however it arrives; or one line that says
why not.

    python -m tests.fuzz.tokenizers --inputs 5000 --seed 1      # the long run
    python -m tests.fuzz.tokenizers --seed 1 --only 17          # one input again
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeinfer.core.errors import UserError
from pipeinfer.text import Text
from pipeinfer.text.files import is_failure
from pipeinfer.text.tokenizer import quietly
from tests.fuzz.tokenizer_folders import make_folder, text


def theirs(do: Callable[[], Any]) -> Any:
    """What transformers says; None if it fails."""
    try:
        with quietly():
            return do()
    except BaseException as error:
        if not is_failure(error):
            raise
        return None


def ours(do: Callable[[], Any]) -> Any:
    """What we say: a refusal must be one line."""
    try:
        return do()
    except UserError as error:
        said = error
    assert str(said).isprintable(), f"not one line: {said}"
    return said


def reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return theirs(lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))


def beyond(prompt: str, whole: str) -> str:
    """The answer's text, by the definition."""
    most = min(len(prompt), len(whole))
    return whole[next((place for place in range(most) if prompt[place] != whole[place]), most) :]


def check_tokens(found: Text, wanted: Any, dice: random.Random) -> None:
    for _ in range(3):
        prompt = text(dice)
        tokens, said = theirs(lambda p=prompt: wanted(p)["input_ids"]), ours(lambda p=prompt: found.encode(p))
        if tokens is None:
            assert isinstance(said, UserError), f"{prompt!r}: transformers fails, we say {said}"
        else:
            assert said == tokens, f"{prompt!r}: {said}, transformers has {tokens}"


def silent(tokens: list[int]) -> frozenset[int]:
    """Which of an answer's tokens are to be no text."""
    return frozenset(tokens[:1]) if tokens and tokens[0] % 3 == 0 else frozenset()


def read(
    found: Text, tokens: list[int], prompt: list[int], stops: list[str], dice: random.Random
) -> tuple[int, str, bool]:
    """How many tokens were taken, the text shown piece by piece, and whether a stop string ended it."""
    reader, taken, shown, rest = found.reader(silent(tokens), stops, prompt), 0, "", list(tokens)
    while rest:
        size = dice.randint(1, 4)
        count, piece = reader.read(rest[:size])
        taken, shown, rest = taken + count, shown + piece, rest[size:]
    shown += reader.close()
    assert reader.close() == "", "closing twice says something twice"
    assert shown == reader.shown
    return taken, shown, reader.is_stopped


def check_text(found: Text, wanted: Any, dice: random.Random) -> None:
    known = range(max(wanted.get_vocab().values(), default=0) + 2)  # and one that is no token
    few = dice.choices(known, k=4)
    for _ in range(6):
        drawn = dice.choices(dice.choice([known, few]), k=dice.randint(0, 20))
        place = dice.randint(0, min(6, len(drawn)))
        prompt, tokens = drawn[:place], drawn[place:]

        def decode(answer: list[int], before: list[int] = prompt) -> Any:
            return theirs(lambda: wanted.decode(before + answer, skip_special_tokens=True))

        before = decode([])
        if None in (before, *(decode(tokens[:count]) for count in range(len(tokens) + 1))):
            said = ours(lambda p=prompt: found.decode(p))  # some decoders fail where there is no text
            assert before is not None or said == "" or isinstance(said, UserError), f"{prompt}: {said}"
            continue
        taken, shown, stopped = read(found, tokens, prompt, [], dice)
        whole = beyond(before, decode([token for token in tokens if token not in silent(tokens)]))
        assert (taken, shown, stopped) == (len(tokens), whole, False), f"{prompt} {tokens}: {shown!r}, not {whole!r}"
        alone = decode(tokens, [])
        assert alone is None or found.decode(tokens) == alone, f"{tokens}: not {alone!r}"
        if whole:
            start = dice.randrange(len(whole))
            stops = [whole[start : start + dice.randint(1, 3)], "lo"]
            check_stops(found, tokens, prompt, stops, before, decode, dice)


def check_stops(
    found: Text, tokens: list[int], prompt: list[int], stops: list[str], before: str, decode: Any, dice: random.Random
) -> None:
    """The answer ends at the same token however it arrives, with the text before the first stop string."""
    taken, shown, stopped = read(found, tokens, prompt, stops, dice)
    assert (taken, shown, stopped) == read(found, tokens, prompt, stops, dice), "it depends on how tokens arrive"
    answer = beyond(before, decode([token for token in tokens[:taken] if token not in silent(tokens)]))
    ends = [answer.find(stop) for stop in stops if stop in answer]
    right = (answer[: min(ends, default=len(answer))], bool(ends))
    assert (shown, stopped) == right, f"{stops} {prompt} {tokens[:taken]}: {shown!r}, not {right[0]!r}"


def check_chat(found: Text, wanted: Any, dice: random.Random) -> None:
    said = text(dice)
    turns = [{"role": "user", "content": said}]
    options = {"add_generation_prompt": True, "return_dict": False}
    tokens = theirs(lambda: wanted.apply_chat_template(turns, **options)) if wanted.chat_template else None
    answer = ours(lambda: found.encode_chat(said))
    if tokens is None:
        assert isinstance(answer, UserError), f"{said!r}: the template fails, we say {answer}"
    else:
        assert answer == tokens, f"chat {said!r}: {answer}, transformers has {tokens}"


def check_input(seed: int, number: int, folder: Path) -> str:
    """One random folder. Returns what became of it."""
    dice = random.Random(f"{seed} {number}")
    make_folder(dice, folder)
    wanted, found = reference(folder), ours(lambda: Text(folder))
    if isinstance(found, UserError):
        assert wanted is None or " lacks " in str(found), f"transformers reads it; {found}"
        return "refused"
    way = type(found._tokenizer).__name__
    if wanted is None:
        return f"{way}, transformers fails"  # over what decides nothing
    assert found.vocabulary() == wanted.get_vocab()
    end = wanted.eos_token_id
    assert found.eos_tokens == frozenset(() if end is None else (end,))
    check_tokens(found, wanted, dice)
    check_text(found, wanted, dice)
    check_chat(found, wanted, dice)
    for name, token in found._tokenizer.special().items():
        assert found.special_stop(name) == token
        assert isinstance(ours(lambda n=name: found.special_stop(f"{n}\u2603x")), UserError)
    streams = "streamed" if found._tokenizer.chain() else "whole"
    return f"{way}, {streams}"


def fuzz(seed: int, numbers: range) -> Counter[str]:
    """Check the inputs ``numbers`` of ``seed``. Returns what became of how many; an error says which one it was."""
    outcomes = Counter[str]()
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcomes[check_input(seed, number, Path(folder))] += 1
            except Exception as error:
                error.add_note(f"again: python -m tests.fuzz.tokenizers --seed {seed} --only {number}")
                raise
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="the number of one input")
    asked = parser.parse_args()
    numbers = range(asked.inputs) if asked.only is None else range(asked.only, asked.only + 1)
    for outcome, count in sorted(fuzz(asked.seed, numbers).items()):
        print(f"{count:6} {outcome}")


if __name__ == "__main__":
    main()
