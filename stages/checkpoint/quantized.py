"""The quantised matrices of a checkpoint: which tensors make each, whether those are there as config.json says, and
reading parts of them. The formats themselves are in stages/quantization."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from stages.checkpoint.folder import AGAIN, has_file, printable, read_object, refuse, shown
from stages.checkpoint.safetensors_file import StoredTensor
from stages.quantization.methods import read_scheme
from stages.quantization.scheme import Packing, Part, Scheme, SchemeError, Shape

if TYPE_CHECKING:
    from torch import Tensor

    from stages.quantization.matrix import QuantizedMatrix

KEYS = ("quantization_config", "compression_config")
"""Of config.json."""
OLD = (("quantize_config.json", "gptq"), ("quant_config.json", "awq"))
"""Files of old repositories, and the methods whose they are."""
WEIGHT = "weight"
Window = Callable[[StoredTensor], Any]
"""Gives a window on a stored tensor: ``window(stored)[...]`` reads."""


def scheme_of(directory: Path) -> Scheme | None:
    """What the configuration in ``directory`` says of its weights; None where they are not quantised. Raises
    CheckpointError for what is not supported."""
    path = directory / "config.json"
    content = read_object(path) if has_file(path) else {}
    found: list[tuple[Any, str, Path, str | None]] = []
    found += [(content[key], key, path, None) for key in KEYS if content.get(key) is not None]
    if not found:
        files = [(directory / name, method) for name, method in OLD if has_file(directory / name)]
        found = [(read_object(file), file.name, file, method) for file, method in files]
    if not found:
        return None
    settings, within, path, usual = found[0]
    try:
        return read_scheme(settings, within, usual)
    except SchemeError as error:
        refuse(f"{path}: {error.thing}", error.fix)


def weights_name(directory: Path) -> str | None:
    """How an old repository calls its file of weights; None if it does not say."""
    for name, _ in OLD:
        if has_file(directory / name):
            base = read_object(directory / name).get("model_file_base_name")
            if isinstance(base, str) and base and "/" not in base and len(base) < 200:
                return f"{base}.safetensors"
    return None


class QuantizedTensors:
    """The matrices among ``tensors``, those of a checkpoint by name, that ``scheme`` says are quantised."""

    def __init__(self, scheme: Scheme | None, tensors: Mapping[str, StoredTensor]) -> None:
        self.scheme = scheme
        self._tensors = tensors
        self._modules: dict[str, dict[str, StoredTensor]] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._is_used = False
        for name, stored in tensors.items() if scheme is not None else ():
            module, _, suffix = name.rpartition(".")
            self._modules.setdefault(module, {})[suffix] = stored

    def packing(self, name: str) -> Packing | None:
        """How the matrix ``name`` is stored; None where it is an ordinary tensor. Raises CheckpointError."""
        module, _, suffix = name.rpartition(".")
        if self.scheme is None or suffix != WEIGHT or module not in self._modules:
            return None
        stored = self._modules[module]
        with self._told(module):
            return self.scheme.packing(module, {suffix: tensor.dtype for suffix, tensor in stored.items()})

    def is_packed(self, name: str) -> bool:
        """Whether the matrix ``name`` is stored in other tensors, although nothing says how."""
        return any(f"{name.removesuffix(WEIGHT)}{suffix}" in self._tensors for suffix in ("qweight", "weight_packed"))

    def refuse_unlike(self, name: str, packing: Packing, shape: Shape) -> None:
        """Refuse the tensors of the matrix ``name`` where they are not as ``packing`` has them for ``shape``."""
        module = name.rpartition(".")[0]
        stored = self._modules[module]
        if len(shape) != 2:
            refuse(f"{self._where(module)}: {module} is quantised, but no matrix", AGAIN)
        for suffix, part in packing.parts(*shape).items():
            if suffix in stored:
                _refuse_part(stored[suffix], part, packing, shape)
            elif not part.is_optional:
                refuse(f"{self._where(module)}: tensor {module}.{suffix} is missing ({packing.format})", AGAIN)
        self._shapes[name] = shape[0], shape[1]
        self._is_used = True

    def refuse_unused(self, directory: Path) -> None:
        """Refuse a configuration of weights of which none that were compared is quantised."""
        if self.scheme is not None and not self._is_used:
            fix = "the two contradict each other: download both again"
            refuse(f"{directory}: config.json says that weights are quantised, and none is", fix)

    def refuse_numbers(self, name: str, packing: Packing, window: Window) -> None:
        """Refuse the matrix ``name`` for the numbers of its small tensors, which are read for that."""
        module = name.rpartition(".")[0]
        for suffix in packing.early:
            if suffix in self._modules[module]:
                with self._told(module):
                    packing.refuse_numbers(suffix, window(self._modules[module][suffix])[:])

    def read(
        self, name: str, packing: Packing, window: Window, part: tuple[slice, ...] | None = None
    ) -> QuantizedMatrix:
        """The ``part`` of the matrix ``name``, by default all. Raises CheckpointError."""
        module = name.rpartition(".")[0]
        outputs, inputs = self.shape(name, packing, window)
        rows, columns = (*(part or ()), slice(None), slice(None))[:2]
        ranges = range(outputs)[rows], range(inputs)[columns]
        with self._told(module):
            return packing.build(_Reader(self._modules[module], window), outputs, inputs, *ranges)

    def shape(self, name: str, packing: Packing, window: Window) -> tuple[int, int]:
        """Outputs and inputs of the matrix ``name``: those that it was compared with, or as its tensors have it."""
        if name not in self._shapes:
            module = name.rpartition(".")[0]
            stored = self._modules[module]
            shapes = {suffix: tensor.shape for suffix, tensor in stored.items()}
            with self._told(module):
                try:
                    self._shapes[name] = packing.shape(shapes, _Reader(stored, window))
                except (KeyError, IndexError, ValueError):
                    refuse(f"{self._where(module)}: {printable(module)} lacks a tensor ({packing.format})", AGAIN)
        return self._shapes[name]

    def logical(self) -> dict[str, StoredTensor]:
        """All tensors by name, each quantised matrix as one of the type F32 and of no shape."""
        if self.scheme is None:
            return dict(self._tensors)
        found = {}
        for module, stored in self._modules.items():
            name = f"{module}.{WEIGHT}"
            packing = self.packing(name)
            parts = packing.parts(1, 1) if packing is not None else {}
            if packing is not None:
                found[name] = StoredTensor(self._where(module), "F32", (), name)
            found |= {f"{module}.{suffix}": tensor for suffix, tensor in stored.items() if suffix not in parts}
        return found

    def _where(self, module: str) -> Path:
        return next(iter(self._modules[module].values())).path

    @contextmanager
    def _told(self, module: str) -> Iterator[None]:
        """Turn a SchemeError into a CheckpointError that names the tensor and its file."""
        try:
            yield
        except SchemeError as error:
            stored = self._modules[module].get(error.tensor)
            if stored is None:
                refuse(f"{self._where(module)}: {printable(module)}: {error.thing}", error.fix)
            refuse(f"{stored.path}: tensor {printable(stored.name)} {error.thing}", error.fix)


class _Reader:
    """See stages.quantization.scheme.Reader."""

    def __init__(self, stored: Mapping[str, StoredTensor], window: Window) -> None:
        self._stored, self._window = stored, window

    def __call__(self, suffix: str, *index: slice) -> Tensor:
        stored = self._stored[suffix]
        tensor: Tensor = self._window(stored)[index or ...].clone()
        if tensor.is_floating_point() and tensor.element_size() > 1 and not bool(tensor.isfinite().all()):
            raise SchemeError("has scales that are not finite", AGAIN, suffix)
        return tensor

    def has(self, suffix: str) -> bool:
        return suffix in self._stored

    def type(self, suffix: str) -> str:
        return self._stored[suffix].dtype

    def shape(self, suffix: str) -> Shape:
        return self._stored[suffix].shape


def _refuse_part(stored: StoredTensor, part: Part, packing: Packing, shape: Shape) -> None:
    what = f"{packing.format}, {shown(list(shape))}"
    if stored.dtype not in part.types:
        fix = "the two contradict each other: download both again"
        refuse(f"{stored.path}: tensor {stored.name} is {stored.dtype}; {what} has {' or '.join(part.types)}", fix)
    if stored.shape not in part.shapes:
        wanted = " or ".join(shown(list(shape)) for shape in part.shapes)
        refuse(
            f"{stored.path}: tensor {stored.name} has shape {shown(list(stored.shape))}, config.json asks for {wanted} "
            f"({what})",
            "the two are of different models or groups: download both again",
        )


def refuse_missing(directory: Path, name: str, shape: Shape, is_packed: bool) -> NoReturn:
    """Raise CheckpointError for a matrix that is not there, or packed in a way that nothing names."""
    if is_packed:
        fix = "download config.json and quantize_config.json again"
        refuse(f"{directory}: tensor {name} is packed, but config.json has no quantization_config", fix)
    refuse(f"{directory}: tensor {name} {shown(list(shape))} is missing", AGAIN)
