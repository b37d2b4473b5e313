"""The weights of a model directory: which tensors there must be, whether they are there, and reading some of them.

Opening and validating read headers only, so that a damaged download is refused in milliseconds and before torch is
loaded; torch is imported by ``read``, and to open pickled weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stages.checkpoint.extents import Extent, TensorWindow, extent_of
from stages.checkpoint.folder import (
    AGAIN,
    has_file,
    model_folder,
    read_object,
    refuse,
    refuse_system,
    refuse_without_weights,
    said,
    shown,
)
from stages.checkpoint.names import llama_name, refuse_collisions, unwrapped
from stages.checkpoint.pickle_file import open_pickle, read_pickle
from stages.checkpoint.quantized import QuantizedTensors, Window, refuse_missing, scheme_of, weights_name
from stages.checkpoint.safetensors_file import FLOAT_NBYTES, StoredTensor, read_header
from stages.checkpoint.spec import ExpertSpec, ModelSpec

if TYPE_CHECKING:
    import torch

    from stages.quantization.matrix import Matrix
    from stages.quantization.scheme import Packing

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
FORMATS = (("model.safetensors", read_header), ("pytorch_model.bin", read_pickle))  # the first that is there counts
MAX_NAME = 200  # characters of a file's name; file systems have 255 bytes


def layer_tensors(spec: ModelSpec, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer's tensors."""
    tensors = dense_tensors(spec, layer)
    if spec.experts is not None:
        tensors[router_name(spec.experts, layer)] = (spec.experts.count, spec.hidden_size)
        for expert in range(spec.experts.count):
            tensors |= expert_tensors(spec, layer, expert)
    return tensors


def router_name(experts: ExpertSpec, layer: int) -> str:
    """The matrix by which a layer's rows choose experts: [experts, hidden_size]."""
    return f"model.layers.{layer}.{experts.block}.gate.weight"


def expert_tensors(spec: ModelSpec, layer: int, expert: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an expert's matrices: gate, up, down."""
    experts, hidden, inner = spec.experts, spec.hidden_size, spec.intermediate_size
    assert experts is not None
    prefix = f"model.layers.{layer}.{experts.block}.experts.{expert}."
    return {
        f"{prefix}{experts.gate}.weight": (inner, hidden),
        f"{prefix}{experts.up}.weight": (inner, hidden),
        f"{prefix}{experts.down}.weight": (hidden, inner),
    }


def dense_tensors(spec: ModelSpec, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer's tensors but for its experts' and their router's."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.head_count * spec.head_dim, spec.kv_head_count * spec.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden, spec.qkv_bias),
        "self_attn.k_proj": (keys, hidden, spec.qkv_bias),
        "self_attn.v_proj": (keys, hidden, spec.qkv_bias),
        "self_attn.o_proj": (hidden, queries, spec.output_bias),
    }
    if spec.experts is None:
        linears |= {
            "mlp.gate_proj": (inner, hidden, spec.mlp_bias),
            "mlp.up_proj": (inner, hidden, spec.mlp_bias),
            "mlp.down_proj": (hidden, inner, spec.mlp_bias),
        }
    prefix = f"model.layers.{layer}."
    tensors: dict[str, tuple[int, ...]] = {
        f"{prefix}input_layernorm.weight": (hidden,),
        f"{prefix}post_attention_layernorm.weight": (hidden,),
    }
    for name, (rows, columns, bias) in linears.items():
        tensors[f"{prefix}{name}.weight"] = (rows, columns)
        if bias:
            tensors[f"{prefix}{name}.bias"] = (rows,)
    if spec.qk_norm:
        tensors[f"{prefix}self_attn.q_norm.weight"] = (spec.head_dim,)
        tensors[f"{prefix}self_attn.k_norm.weight"] = (spec.head_dim,)
    return tensors


def expected(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of everything the model needs, layer by layer; a tied model's head is its embedding."""
    yield EMBEDDING, (spec.vocab_size, spec.hidden_size)
    for layer in range(spec.layer_count):
        yield from layer_tensors(spec, layer).items()
    yield NORM, (spec.hidden_size,)
    if not spec.tied:
        yield HEAD, (spec.vocab_size, spec.hidden_size)


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """All that ``expected`` yields, as a dict."""
    return dict(expected(spec))


def shard_tensors(spec: ModelSpec, layers: range) -> list[str]:
    """What the shard of these layers reads: the first also the embedding, the last also the final norm and the head."""
    names = [EMBEDDING] if layers.start == 0 else []
    for layer in layers:
        names.extend(layer_tensors(spec, layer))
    if layers.stop == spec.layer_count:
        names.append(NORM)
        head = EMBEDDING if spec.tied else HEAD
        if head not in names:
            names.append(head)
    return names


class Weights(Protocol):
    """Where a shard gets its tensors from. What has no quantised weights inherits ``matrices`` and ``note``."""

    @property
    def note(self) -> str:
        """What the user should know of the weights, in one line; empty for nothing."""
        return ""

    def stored_name(self, name: str) -> str:
        """The tensor that stands for ``name``, an end of a tied model."""
        ...

    def read(
        self, names: Iterable[str], dtype: torch.dtype, slices: Mapping[str, tuple[slice, ...]] | None = None
    ) -> dict[str, torch.Tensor]:
        """These tensors and no others, as ``dtype``, in memory of their own; ``slices``: what of each, if not all of
        them whole. Raises CheckpointError."""
        ...

    def matrices(
        self, names: Iterable[str], dtype: torch.dtype, slices: Mapping[str, tuple[slice, ...]] | None = None
    ) -> dict[str, Matrix]:
        """The same, but what is stored in few bits stays so. Where nothing is, this is ``read``."""
        return dict(self.read(names, dtype, slices))

    def extents(self, names: Iterable[str], slices: Mapping[str, tuple[slice, ...]] | None = None) -> list[Extent]:
        """What ``matrices`` will read through read_extent for the same arguments, for whoever reads ahead: parts of
        files, perhaps not all. Nothing where nothing is known."""
        return []


class Checkpoint(Weights):
    """The weights of one model directory, their headers read and their lengths checked; safetensors before pickles.

    ``tensors`` has them by the names that the model's code gives them (see names.py). With ``llama`` those are
    the Llama family's; otherwise only what wrappers added is taken off. Raises CheckpointError for files that are
    missing, damaged or of another format, and for names of which two mean the same.
    """

    def __init__(self, directory: str | Path, llama: bool = True) -> None:
        self.directory = model_folder(directory)
        stored = self._stored()
        rename = llama_name if llama else unwrapped
        meant = {tensor.name: rename(tensor.name) for tensor in stored}
        refuse_collisions(self.directory, meant.items())
        self.tensors: dict[str, StoredTensor] = {meant[tensor.name]: tensor for tensor in stored}
        self.quantized = QuantizedTensors(scheme_of(self.directory), self.tensors)

    @property
    def note(self) -> str:
        """See Weights."""
        scheme = self.quantized.scheme
        return f"{self.directory}: {scheme.note}" if scheme is not None and scheme.note else ""

    def _stored(self) -> list[StoredTensor]:
        own = weights_name(self.directory)
        for name, read in (*FORMATS, *([(own, read_header)] if own else ())):
            if has_file(self.directory / name):
                return list(read(self.directory / name).values())
            index = self.directory / f"{name}.index.json"
            if has_file(index):
                return self._indexed(index)
        refuse_without_weights(self.directory)

    def _indexed(self, index: Path) -> list[StoredTensor]:
        """The tensors that an index names, each from the file that it names."""
        read = dict(FORMATS)[index.name.removesuffix(".index.json")]
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            refuse(f"{index} is no index of weights: weight_map is {shown(weight_map)}", AGAIN)
        headers: dict[str, dict[str, StoredTensor]] = {}
        for file in weight_map.values():
            if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or len(file) > MAX_NAME:
                refuse(f"{index} is no index of weights: it names the file {shown(file)}", AGAIN)
            if file not in headers:
                if not has_file(self.directory / file):
                    refuse(f"{self.directory / file} is missing, but {index.name} names it", AGAIN)
                headers[file] = read(self.directory / file)
        return [headers[file][name] for name, file in weight_map.items() if name in headers[file]]

    def stored_name(self, name: str) -> str:
        """The tensor that stands for ``name``: where only one of embedding and head is stored, it serves as both.

        Call it for names that tie; like transformers, a tied model that stores a head of its own uses that one."""
        other = {HEAD: EMBEDDING, EMBEDDING: HEAD}.get(name, name)
        return other if not self._has(name) and self._has(other) else name

    def _has(self, name: str) -> bool:
        return name in self.tensors or self.quantized.packing(name) is not None

    def validate(self, spec: ModelSpec) -> None:
        """Check that every tensor of the model is there, in shape and in a float type, or quantised as config.json
        says. Raises CheckpointError."""
        with numpy_windows() as window:
            for name, shape in expected(spec):
                self._validate(self.stored_name(name) if spec.tied else name, shape, window)
            if spec.tied and self._has(HEAD):
                self._validate(HEAD, (spec.vocab_size, spec.hidden_size), window)
        self.quantized.refuse_unused(self.directory)

    def _validate(self, name: str, shape: tuple[int, ...], window: Window) -> None:
        packing = self.quantized.packing(name)
        if packing is not None:
            self.quantized.refuse_unlike(name, packing, shape)
            if packing.early:
                with reading(self.directory):
                    self.quantized.refuse_numbers(name, packing, window)
        elif name in self.tensors:
            refuse_unlike(self.tensors[name], shape)
        else:
            refuse_missing(self.directory, name, shape, self.quantized.is_packed(name))

    def read(
        self, names: Iterable[str], dtype: torch.dtype, slices: Mapping[str, tuple[slice, ...]] | None = None
    ) -> dict[str, torch.Tensor]:
        """See Weights."""
        from stages.quantization.matrix import dense

        return {name: dense(matrix).to(dtype) for name, matrix in self._read(names, dtype, slices)}

    def matrices(
        self, names: Iterable[str], dtype: torch.dtype, slices: Mapping[str, tuple[slice, ...]] | None = None
    ) -> dict[str, Matrix]:
        """See Weights."""
        return dict(self._read(names, dtype, slices))

    def _read(
        self, names: Iterable[str], dtype: torch.dtype, slices: Mapping[str, tuple[slice, ...]] | None
    ) -> Iterator[tuple[str, Matrix]]:
        """Each tensor, in memory of its own, those of one file together; and after them the quantised ones."""
        wanted: dict[Path, dict[str, str]] = {}  # by file: our names by stored names
        packings: dict[str, Packing] = {}
        for name in names:
            packing = self.quantized.packing(name)
            if packing is not None:
                packings[name] = packing
                continue
            if name not in self.tensors:
                refuse(f"{self.directory}: tensor {name} is missing", AGAIN)
            wanted.setdefault(self.tensors[name].path, {})[self.tensors[name].name] = name
        window = torch_windows()
        for path, by_stored in wanted.items():
            with reading(path):
                for name in by_stored.values():
                    part = window(self.tensors[name])[slices[name] if slices else ...]
                    # Without the copy a pickled tensor would stay a window on the mapped file, a part of columns one on
                    # the whole tensor.
                    yield name, part.to(dtype, copy=path.suffix == ".bin" or not part.is_contiguous())
        with reading(self.directory):
            for name, packing in packings.items():
                yield name, self.quantized.read(name, packing, window, slices[name] if slices else None)

    def extents(self, names: Iterable[str], slices: Mapping[str, tuple[slice, ...]] | None = None) -> list[Extent]:
        """See Weights: of each matrix all that is stored under its name, whatever the format."""
        found = list[Extent]()
        for name in names:
            if name in self.tensors:
                found.append(extent_of(self.tensors[name], slices[name] if slices else ...)[0])
            else:
                prefix = name.removesuffix("weight")
                found += [extent_of(one)[0] for other, one in self.tensors.items() if other.startswith(prefix)]
        return sorted((one for one in found if one.nbytes), key=lambda one: (one.path, one.start))


def refuse_unlike(stored: StoredTensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape, or of a type that is not a float."""
    if stored.shape != shape:
        asked = f"config.json asks for {shown(list(shape))}"
        refuse(
            f"{stored.path}: tensor {stored.name} has shape {shown(list(stored.shape))}, {asked}",
            "the two are of different models: download both again",
        )
    if stored.dtype not in FLOAT_NBYTES:
        refuse(f"{stored.path}: tensor {stored.name} is {stored.dtype}", f"use one of {', '.join(FLOAT_NBYTES)}")


def torch_windows() -> Window:
    """Windows on tensors of any files, as torch reads them: safetensors by pread (see extents), pickles once."""
    pickles: dict[Path, Any] = {}

    def window(stored: StoredTensor) -> Any:
        path = stored.path
        if path.suffix != ".bin":
            return TensorWindow(stored)
        if path not in pickles:
            pickles[path] = open_pickle(path)
        return pickles[path][stored.name]

    return window


@contextmanager
def numpy_windows() -> Iterator[Window]:
    """Windows on tensors of safetensors files for what is checked without torch; each file is opened once."""
    with ExitStack() as files:
        found: dict[Path, Any] = {}

        def window(stored: StoredTensor) -> Any:
            path = stored.path
            if path not in found:
                from safetensors import safe_open

                found[path] = files.enter_context(safe_open(path, framework="numpy", device="cpu"))
            return found[path].get_slice(stored.name)

        yield window


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of reading weights from ``path`` into a CheckpointError with the reason."""
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        refuse_system(path, error)
    except (SafetensorError, KeyError, ValueError) as error:  # the file was another one when its header was read
        refuse(f"{path} cannot be read ({said(error)})", AGAIN)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "alloc" in str(error):  # torch has no class of its own for it
            refuse(f"{path} does not fit into memory ({said(error)})", "use more ranks, bf16 or a smaller model")
        refuse(f"{path} cannot be loaded ({said(error)})", AGAIN)
