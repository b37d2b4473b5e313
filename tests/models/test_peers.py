"""Peers say what we say, exactly as many tokens as asked for, and when they said them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from pipeinfer import Engine
from pipeinfer.bench.peers import is_peer, open_peer
from pipeinfer.core.config import BUILTIN
from pipeinfer.core.errors import UserError
from tests.models.tiny import VOCAB_SIZE, make_tiny

PROMPTS = ("def read_lines(path):\n", "import os\n")
COUNT = 40
PEERS = ("hf", "hf-assisted", "hf-assisted-3")


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_says_what_we_say(name: str) -> None:
    peer = open_peer(name, BUILTIN, BUILTIN, "fp32", 1)
    assert (peer.name, torch.get_num_threads()) == (name, 1)
    with Engine(dtype="fp32") as engine:
        assert engine is not None
        for prompt in PROMPTS:
            wanted = engine.generate(prompt, COUNT, ignore_eos=True)
            before = time.monotonic()
            tokens, emitted_at, began_at = peer.generate(wanted.prompt_tokens, COUNT)
            times, counts = [at for at, _ in emitted_at], [count for _, count in emitted_at]
            assert tokens == wanted.tokens
            assert sum(counts) == COUNT
            moments = [before, began_at, *times, time.monotonic()]
            assert moments == sorted(moments)
            assert max(counts) == {"hf": 1, "hf-assisted-3": 4}.get(name, max(counts))
            assert (len(counts) < COUNT) == (name != "hf")


@pytest.mark.parametrize("name", PEERS)
def test_the_end_of_a_text_does_not_end_it(name: str, tmp_path: Path) -> None:
    """Of a model whose every token is one."""
    make_tiny(tmp_path, "LlamaForCausalLM")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(VOCAB_SIZE))}))
    tokens, _, _ = open_peer(name, tmp_path, tmp_path, "bf16", 1).generate([5, 6, 7], 12)
    assert len(tokens) == 12


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("gpt", BUILTIN, BUILTIN, "fp32"), "unknown peer 'gpt'"),
        (("hf-assisted-0", BUILTIN, BUILTIN, "fp32"), "unknown peer"),
        (("hf", BUILTIN, None, "fp8"), "unknown dtype 'fp8'"),
        (("hf-assisted", BUILTIN, None, "fp32"), "hf-assisted without a draft"),
        (("llama.cpp-assisted-4", BUILTIN, None, "fp32"), "llama.cpp-assisted-4 without a draft"),
        (("hf", "/no/such/model", None, "fp32"), "cannot load /no/such/model"),
    ],
)
def test_what_cannot_be_had_is_refused(words: tuple[str, str, str | None, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        open_peer(*words, 1)


def test_peers_are_known_by_their_names() -> None:
    assert all(map(is_peer, (*PEERS, "llama.cpp", "llama.cpp-assisted", "llama.cpp-assisted-3")))
    strangers = ("hf-", "hf-assisted-", "llama.cpp-", "llamaXcpp", "hf-llama.cpp", "continuous", "sync-chain")
    assert not any(map(is_peer, strangers))
