"""Decoding from GGUF files: by every policy the same tokens, and for float types the tokens of the directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeinfer import Engine
from pipeinfer.core.errors import UserError
from tests.models.gguf_files import convert

BUILTIN = Path(__file__).resolve().parents[2] / "pipeinfer/builtin"
PROMPT, COUNT = "def mean(numbers):\n", 24


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The built-in pair in files: the target in Q8_0 and in several types of K blocks, the draft in Q4_0."""
    place = tmp_path_factory.mktemp("gguf")

    def mixed(name: str) -> str:
        return "Q6_K" if "v_proj" in name or "embed" in name else "Q3_K" if "down" in name else "Q4_K"

    return {
        "target": convert(BUILTIN / "target", place / "target.gguf", "Q8_0"),
        "bf16": convert(BUILTIN / "target", place / "bf16.gguf", "BF16"),
        "mixed": convert(BUILTIN / "target", place / "mixed.gguf", mixed),
        "draft": convert(BUILTIN / "draft", place / "draft.gguf", "Q4_0"),
    }


def tokens(target: Path | str, draft: Path | str | None, **more: object) -> list[int]:
    policy = "plain" if draft is None else "continuous"
    with Engine(target, draft or "none", policy=policy, threads=1, **more) as engine:  # type: ignore[arg-type]
        assert engine is not None
        return list(engine.generate(PROMPT, COUNT, ignore_eos=True).tokens)


@pytest.mark.parametrize("target", ["target", "mixed"])
def test_policies_agree(target: str, files: dict[str, Path]) -> None:
    plain = tokens(files[target], None)
    assert len(set(plain)) > 5
    assert tokens(files[target], files["draft"]) == plain
    assert tokens(files[target], BUILTIN / "draft") == plain


def test_a_bfloat16_file_is_the_directory(files: dict[str, Path]) -> None:
    assert tokens(files["bf16"], None) == tokens(BUILTIN / "target", None) == tokens(BUILTIN / "target", files["draft"])


def test_another_tokenizer(files: dict[str, Path], tmp_path: Path) -> None:
    def foreign(metadata: dict[str, object], tensors: object) -> None:
        metadata["tokenizer.ggml.pre"] = "viking"

    path = convert(BUILTIN / "target", tmp_path / "model.gguf", "Q8_0", foreign)
    with pytest.raises(UserError, match=r"pre-tokenizer viking .* with --tokenizer DIR"):
        tokens(path, None)
    assert tokens(path, None, tokenizer=BUILTIN / "target") == tokens(files["target"], None)
    assert tokens(path, path, tokenizer=BUILTIN / "target") == tokens(files["target"], None)
    folder = shutil.copytree(BUILTIN / "target", tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((folder / name).read_text().replace('"<|endoftext|>"', '"<|other|>"'))
    with pytest.raises(UserError, match="different vocabularies"):
        tokens(files["target"], files["draft"], tokenizer=folder)
