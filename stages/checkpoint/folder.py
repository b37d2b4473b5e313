"""A model's folder: its files, and, if it holds no model, the reason and the remedy.

Every message is one line. Names, file contents and system messages are made printable and cut before they are quoted.
Nothing here imports more than the standard library.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from pipeinfer.core.errors import CheckpointError

AGAIN = "download or export the model again"
MAX_JSON_NBYTES = 64 << 20
MAX_QUOTE, MAX_MESSAGE = 100, 400  # characters: of a value or a reason, and of all that comes before the fix

# Error numbers of the system as a reason and a fix; only damage is fixed by another download.
_SYSTEM = {
    errno.EACCES: ("may not be read by this user", "change its permissions, or run as a user who may read it"),
    errno.EPERM: ("may not be read by this user", "change its permissions, or run as a user who may read it"),
    errno.ENAMETOOLONG: ("has a name too long for the file system", "give a shorter path"),
    errno.ELOOP: ("leads through links in a circle", "give the path of the folder itself"),
    errno.EIO: ("cannot be read: the disk or the network file system fails (EIO)", "check it, or copy the model"),
    errno.ESTALE: ("has gone from the network file system (ESTALE)", "mount it again, or copy the model"),
    errno.EMFILE: ("cannot be opened: too many files are open", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("cannot be opened: too many files are open on this machine", "close some"),
    errno.ENOMEM: ("cannot be read: memory is short", "use more machines or a smaller model"),
}
# What folders hold instead of weights in Hugging Face layout.
_FOREIGN = (
    ("adapter_model.*", "holds only a LoRA adapter", "merge it into its base model and save that (in PEFT: "
     "merge_and_unload, then save_pretrained)"),
    ("*.gguf", "holds a GGUF file", "give the path of that file"),
    ("*.onnx", "holds an ONNX model", "give the model's safetensors release"),
    ("consolidated.*", "holds its authors' own format (consolidated.*)", "give its release in Hugging Face layout"),
    ("*.pth", "holds its authors' own format (*.pth)", "give its release in Hugging Face layout"),
    ("*.h5", "holds weights for TensorFlow", "load it in transformers and save_pretrained it"),
    ("*.msgpack", "holds weights for Flax", "load it in transformers and save_pretrained it"),
)  # fmt: skip
# What there may be beside config.json where the weights are not as they should be.
_INCOMPLETE = (
    ("model-*-of-*.safetensors", "holds parts, but no model.safetensors.index.json", "download the index, too"),
    ("pytorch_model-*-of-*.bin", "holds parts, but no pytorch_model.bin.index.json", "download the index, too"),
    ("*.safetensors", "holds safetensors under another name", "give a folder with model.safetensors"),
    ("*.bin", "holds pickled files under another name", "give a folder with model.safetensors"),
)


def refuse(thing: str, fix: str) -> NoReturn:
    """Raise a CheckpointError: the problem, then the fix."""
    raise CheckpointError(f"{printable(thing, MAX_MESSAGE)}; {printable(fix, MAX_MESSAGE)}")


def printable(text: str, most: int = MAX_QUOTE) -> str:
    """``text`` in one line of at most ``most`` characters; of what is longer, the middle is left out."""
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return line if len(line) <= most else f"{line[: most // 2 - 3]} ... {line[len(line) - most // 2 + 2 :]}"


def shown(value: object) -> str:
    """A value of a damaged file, short enough for a message."""
    if isinstance(value, (dict, list)) and len(value) > 8:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    try:
        return printable(repr(value))
    except (ValueError, RecursionError):  # an integer of thousands of digits, or nests without end
        return f"a {type(value).__name__}"


def plain(value: object) -> str:
    """As ``shown``, but text without quotes."""
    return printable(value) if isinstance(value, str) else shown(value)


def said(error: BaseException) -> str:
    """The first line of what an exception says."""
    lines = str(error).strip().splitlines()
    return printable(f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


def refuse_system(path: Path, error: OSError) -> NoReturn:
    """Raise CheckpointError with the system's reason for not reading ``path``."""
    known = _SYSTEM.get(error.errno or 0)
    if known is not None:
        refuse(f"{path} {known[0]}", known[1])
    refuse(f"{path} cannot be read ({error.strerror or said(error)})", "check the path and its file system")


def status(path: Path) -> os.stat_result | None:
    """The status of ``path``, links followed; None if there is no file. Raises CheckpointError if unknown."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            target = printable(os.readlink(path))
            refuse(f"{path} is a link to {target}, which is missing", "bring that back, or give another copy")
        return None
    except ValueError:
        refuse(f"{path}: no file has a name with a null character", "correct the name")
    except OSError as error:
        refuse_system(path, error)


def has_file(path: Path) -> bool:
    """Whether ``path`` is a file. Raises CheckpointError if unknown."""
    found = status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def model_folder(directory: str | Path) -> Path:
    """``directory`` as a Path. Raises CheckpointError if it is no directory."""
    folder = Path(directory)
    if not str(directory):
        refuse("the name of a model's directory is empty", "give a local directory in Hugging Face layout")
    found = status(folder)
    if found is None:
        is_hub_name = not folder.is_absolute() and len(folder.parts) == 2 and folder.parts[0] not in ("..", "~")
        fix = "give a local directory in Hugging Face layout"
        refuse(f"{folder}: no such model directory", f"{fix}: models are not downloaded" if is_hub_name else fix)
    if not stat.S_ISDIR(found.st_mode):
        for pattern, what, fix in _FOREIGN[:4]:
            if folder.match(pattern):
                fix = "give a directory in Hugging Face layout" if is_gguf_name(folder) else fix
                refuse(f"{folder} is no directory: it {what.replace('holds', 'is', 1)}", fix)
        refuse(f"{folder} is a file", "give the directory that holds it, with config.json")
    return folder


def is_gguf_name(path: str | Path) -> bool:
    """Whether ``path`` names a GGUF file and no directory."""
    return str(path).lower().endswith(".gguf") and not os.path.isdir(path)


def read_config(directory: str | Path, name: str = "config.json") -> tuple[Path, dict[str, Any]]:
    """The path and the content of a directory's config.json. Raises CheckpointError."""
    folder = model_folder(directory)
    path = folder / name
    if not has_file(path):
        _explain(folder)
        refuse(f"{path} is missing", "give a directory that holds config.json and model.safetensors")
    return path, read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        if os.stat(path).st_size > MAX_JSON_NBYTES:
            refuse(f"{path} is larger than {MAX_JSON_NBYTES >> 20} MiB", AGAIN)
        content = path.read_bytes()
    except OSError as error:
        refuse_system(path, error)
    refuse_pointer(path, content)
    try:
        fields = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        refuse(f"{path} cannot be read as JSON ({said(error)})", AGAIN)
    if not isinstance(fields, dict):
        refuse(f"{path} must hold an object", AGAIN)
    return fields


def refuse_pointer(path: Path, start: bytes) -> None:
    """Refuse an empty file and a Git LFS pointer. ``start``: the file's first bytes."""
    if not start.strip(b"\0 \t\r\n"):
        refuse(f"{path} is empty" if not start else f"{path} begins with nothing but blanks", AGAIN)
    if start.startswith(b"version https://git-lfs"):
        refuse(f"{path} is a Git LFS pointer and not the file itself", "fetch it with git lfs pull")


def refuse_without_weights(folder: Path) -> NoReturn:
    """Raise CheckpointError with the other contents of a ``folder`` without readable weights."""
    _explain(folder, _FOREIGN + _INCOMPLETE)
    path = folder / "model.safetensors"
    refuse(f"{path} is missing", "give a directory that holds model.safetensors or its index and shards")


def _explain(folder: Path, foreign: tuple[tuple[str, str, str], ...] = _FOREIGN) -> None:
    """Refuse a folder that holds a model in another place or another form."""
    snapshots = _folders(folder / "snapshots")
    if snapshots:
        refuse(f"{folder} is a hub cache, not a model directory", f"give {_snapshot(folder, snapshots)}")
    inner = [inside for inside in _folders(folder) if os.path.isfile(inside / "config.json")]
    if inner:
        names = ", ".join(printable(inside.name, 40) for inside in inner[:3]) + ", ..." * (len(inner) > 3)
        refuse(f"{folder} holds no config.json, but folders that do: {names}", f"give one, as {inner[0]}")
    cached = [inside for inside in _folders(folder) if inside.name.startswith("models--")]
    if cached:
        names = ", ".join(printable(inside.name, 40) for inside in cached[:3]) + ", ..." * (len(cached) > 3)
        refuse(f"{folder} is a hub cache of {names}", f"give a snapshot, as {cached[0] / 'snapshots'}/REVISION")
    for pattern, what, fix in foreign:
        found = sorted(name for name in _names(folder) if Path(name).match(pattern))
        if found:
            refuse(f"{folder} {what} ({printable(found[0], 60)})", fix)


def _snapshot(folder: Path, snapshots: list[Path]) -> Path:
    """Of a hub cache's snapshots the one that ``main`` means, or else the newest."""
    try:
        main = folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
        if main in snapshots:
            return main
    except (OSError, ValueError):
        pass  # a cache without refs: take the newest snapshot
    return max(snapshots, key=lambda snapshot: snapshot.stat().st_mtime)


def _folders(folder: Path) -> list[Path]:
    return [folder / name for name in _names(folder) if os.path.isdir(folder / name)]


def _names(folder: Path) -> Iterator[str]:
    """What a folder holds, in order; nothing for one that cannot be listed."""
    try:
        yield from sorted(os.listdir(folder))
    except OSError:
        return
