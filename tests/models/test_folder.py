"""A folder that holds no model that can be read is refused in one line, for the true reason."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.preflight import clear
from pipeinfer.core.config import BUILTIN, Config, draft_names, model_directory
from pipeinfer.core.errors import CheckpointError, UserError
from stages.checkpoint.checkpoint import Checkpoint
from stages.checkpoint.folder import model_folder, printable, read_config, shown
from stages.checkpoint.spec import ModelSpec
from stages.models.generic_spec import GenericSpec

NOBODY = 65534


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may enter any folder; another user may not."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def refusal(folder: str | Path) -> str:
    """What both readers of configs say, which is the same."""
    said = []
    for read in (ModelSpec.read, GenericSpec.read):
        with pytest.raises(CheckpointError) as caught:
            read(folder)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "\n" not in said[0] and "; " in said[0]
    return said[0]


def config(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_names_that_are_no_folder(tmp_path: Path) -> None:
    assert "is empty; give a local directory" in refusal("")
    assert "name too long for the file system; give a shorter path" in refusal(tmp_path / ("a" * 300))
    assert "null character; correct the name" in refusal("a\0b")
    assert "a\\nb: no such model directory" in refusal("a\nb")
    assert "no such model directory; give a local directory in Hugging Face layout" in refusal(tmp_path / "nowhere")
    assert "layout: models are not downloaded" in refusal("organisation/model")
    (tmp_path / "model.onnx").write_bytes(b"ONNX")
    assert "is no directory: it is an ONNX model; give the model's safetensors" in refusal(tmp_path / "model.onnx")
    (tmp_path / "file").write_bytes(b"")
    assert "file is a file; give the directory that holds it" in refusal(tmp_path / "file")
    assert "no such model directory" in refusal(tmp_path / "file" / "below")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert "links in a circle" in refusal(tmp_path / "circle")
    (tmp_path / "gone").symlink_to(tmp_path / "elsewhere")
    assert f"gone is a link to {tmp_path}/elsewhere, which is missing" in refusal(tmp_path / "gone")


def test_links_in_a_folder_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "config.json").symlink_to("blobs/0123")
    assert "config.json is a link to blobs/0123, which is missing; bring that back" in refusal(tmp_path)
    (tmp_path / "model.safetensors").symlink_to("blobs/4567")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a link to blobs/4567, which is missing"):
        Checkpoint(tmp_path)


def test_folders_and_files_that_may_not_be_read(tmp_path: Path) -> None:
    for place in (*list(tmp_path.parents)[:-2], tmp_path):  # pytest lets nobody else in
        if place.stat().st_uid == os.geteuid():
            place.chmod(place.stat().st_mode | 0o055)
    closed, open_ = config(tmp_path / "closed"), config(tmp_path / "open")
    (open_ / "model.safetensors").write_bytes(b"12345678")
    for path in (open_ / "config.json", open_ / "model.safetensors", closed):
        path.chmod(0)
    with without_privileges():
        for folder in (closed, open_):
            assert f"{folder}/config.json may not be read by this user; change its permissions" in refusal(folder)
        with pytest.raises(CheckpointError, match=r"model\.safetensors may not be read by this user"):
            Checkpoint(open_)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EIO, "the disk or the network file system fails (EIO)"),
        (errno.ESTALE, "gone from the network file system"),
        (errno.EMFILE, "too many files are open"),
        (errno.ENOMEM, "memory is short"),
        (errno.ENOSYS, "Function not implemented"),
    ],
)
def test_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str) -> None:
    def fail(self: Path) -> bytes:
        raise OSError(number, os.strerror(number))

    config(tmp_path / "model")
    monkeypatch.setattr(Path, "read_bytes", fail)
    assert says in refusal(tmp_path / "model")
    assert "download" not in refusal(tmp_path / "model")


def test_a_hub_cache_names_its_snapshot(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    old, new = config(cache / "snapshots" / "aaaa"), config(cache / "snapshots" / "bbbb")
    os.utime(old, (1, 1))
    assert f"is a hub cache, not a model directory; give {new}" in refusal(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("aaaa")
    assert refusal(cache).endswith(f"give {old}")
    (cache / "refs" / "main").write_bytes(b"\xff../../..")
    assert refusal(cache).endswith(f"give {new}")
    assert f"is a hub cache of models--org--name; give a snapshot, as {cache}/snapshots/REVISION" in refusal(tmp_path)


def test_a_folder_of_models_names_them(tmp_path: Path) -> None:
    for name in "abcde":
        config(tmp_path / name)
    said = refusal(tmp_path)
    assert said == f"{tmp_path} holds no config.json, but folders that do: a, b, c, ...; give one, as {tmp_path}/a"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"\0" * 50, b'{"a": 1' + b"0" * 5000 + b"}"]
)
def test_damaged_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert "download or export the model again" in refusal(tmp_path)
    assert len(refusal(tmp_path)) < 300 + len(str(tmp_path))


def test_what_is_quoted_is_short_and_in_one_line() -> None:
    assert printable("a\nb\x1b[0m\ud800") == "a\\nb\\x1b[0m\\ud800"
    assert printable("x" * 50 + "y" * 5000).startswith("x" * 40) and len(printable("z" * 5000)) <= 100
    assert shown(list(range(9))) == "a list of 9" and shown({"a": 1}) == "{'a': 1}"
    assert shown(10**5000) == "a int"


@pytest.mark.parametrize("part", ["target", "draft"])
def test_names_of_models_in_programs(tmp_path: Path, part: str) -> None:
    assert model_directory(BUILTIN, part).name == part
    for given in ("", "  "):
        with pytest.raises(UserError, match=f"name of the {part}'s directory is empty; give"):
            model_directory(given, part)
    with pytest.raises(UserError, match=f"the {part} is a int; give its directory as text or as a path"):
        model_directory(5, part)  # type: ignore[arg-type]


def test_drafts_may_be_paths(tmp_path: Path) -> None:
    path = tmp_path / "draft"
    assert draft_names("target", path, None) == (str(path),)
    assert draft_names(tmp_path, [path, "other"], 2) == (str(path), "other")
    assert draft_names(BUILTIN, None, None) == (BUILTIN,)
    with pytest.raises(UserError, match="name of the draft's directory is empty"):
        draft_names("target", [""], None)
    with pytest.raises(UserError, match="the draft is a float"):
        draft_names("target", 0.5, None)  # type: ignore[arg-type]


def test_a_negative_context_is_refused() -> None:
    with pytest.raises(UserError, match="--context -5; ask for at least one token"):
        clear(Config(context=-5), 1)


def test_content_comes_back(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"a": [1]}))
    assert read_config(tmp_path) == (tmp_path / "config.json", {"a": [1]})
    assert model_folder(str(tmp_path)) == tmp_path
