"""llama.cpp as a peer: our tokens from the same weights, exactly as many as asked for, in llama.cpp's own time."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeinfer import Engine
from pipeinfer.bench import llama_cpp
from pipeinfer.bench.llama_cpp import CHUNK, LENGTHS, LlamaCppEvaluator
from pipeinfer.bench.peers import check_peers, may_differ, open_peer
from pipeinfer.bench.shaped_pair import PROMPT, make_pair
from pipeinfer.core.errors import UserError
from tests.models.test_shaped_pair import TINY

COUNT, LEAST = 40, 8
here = pytest.mark.skipif(not llama_cpp.is_here(), reason="the extra peers is not installed")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pairs") / "pair"
    make_pair(place, replace(TINY, layer_count=4), 2, 48)
    return place


@here
@pytest.mark.parametrize("name", ["llama.cpp", "llama.cpp-assisted", "llama.cpp-assisted-3"])
def test_it_says_what_we_say(name: str, pair: Path) -> None:
    peer = open_peer(name, pair / "target", pair / "draft", "fp32", 1)
    with Engine(pair / "target") as engine:
        assert engine is not None
        wanted = engine.generate(PROMPT, COUNT, ignore_eos=True).tokens
    before = time.monotonic()
    tokens, emitted_at, began_at = peer.generate(PROMPT, COUNT)
    # Its keys and values are fp16: where two tokens are close, it may take the other one.
    assert len(tokens) == COUNT and tokens[:LEAST] == wanted[:LEAST]
    counts = [count for _, count in emitted_at]
    assert sum(counts) == COUNT and (len(counts) < COUNT) == (name != "llama.cpp")
    moments = [before, began_at, *(at for at, _ in emitted_at)]
    assert moments == sorted(moments)
    assert "llama" in peer.facts["library"]
    length = peer.facts.get("length")
    assert length in {"llama.cpp": [None], "llama.cpp-assisted-3": [3]}.get(name, LENGTHS)
    assert peer.generate(PROMPT, COUNT)[0] == tokens  # nothing of the first text is left


@here
def test_long_texts_come_in_chunks(pair: Path) -> None:
    whole, stepwise = (LlamaCppEvaluator(pair / "draft", "fp32", 1) for _ in range(2))
    text = [3 + 7 * index % 2000 for index in range(CHUNK + 40)]
    wanted = whole.choices(text, 0, 50)
    stepwise.choices(text[:-50], 0, 1)
    assert [stepwise.choices(text[at : at + 1], at, 1)[0] for at in range(len(text) - 50, len(text))] == wanted
    assert whole.choices(text[100:104], 100, 4) == whole.choices(text[:104], 0, 4)
    assert whole.seconds > 0


def test_where_the_packages_are_missing_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "LIBRARIES", (("no_such_module", "nothing", "lib.so"),))
    for names in (["plain", "llama.cpp"], ["llama.cpp-assisted-4"]):
        with pytest.raises(UserError, match=r"pip install 'pipeinfer\[peers\]'$"):
            check_peers(names)
    check_peers(["plain", "hf", "continuous"])


def test_a_library_that_does_not_load_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "lib.so").write_bytes(b"no library")
    (tmp_path / "broken" / "__init__.py").write_text("raise RuntimeError('it was imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(llama_cpp, "LIBRARIES", (("broken", "pytest", "lib.so"),))
    monkeypatch.setattr(llama_cpp, "require", lambda: None)
    llama_cpp.library.cache_clear()
    with pytest.raises(UserError, match="cannot be used"):
        llama_cpp.library()
    llama_cpp.library.cache_clear()


def test_whose_tokens_may_differ() -> None:
    assert may_differ("llama.cpp", "fp32") and may_differ("hf", "bf16")
    assert not may_differ("hf-assisted", "fp32") and not may_differ("continuous", "bf16")
