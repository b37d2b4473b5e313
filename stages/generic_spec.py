"""Whether a model directory holds a decoder that can be cut by its layers, whatever its architecture, and how.

``config.json`` alone settles part of it, and is read with the standard library. The rest is found out by looking: the
model is built without weights and run without layers (see stages/generic_probe.py), and each layer is stopped where its
attention begins. What a layer is given must follow from tokens, positions, masks and cells alone: that is tested by
shuffling the rows. Whatever does not fit is refused by name.

This module imports neither torch nor transformers until a directory is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.checkpoint import Checkpoint
from stages.spec import refuse

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from stages.generic_skeleton import Skeleton

LAYER_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
USE_ANOTHER = "use a decoder-only model with plain attention layers"


@dataclass(frozen=True, slots=True)
class GenericSpec:
    """How to cut one decoder. ``context``: no position may reach it."""

    directory: Path
    architecture: str  # transformers' class, as "GPT2LMHeadModel"
    vocab_size: int
    hidden_size: int
    layer_count: int
    context: int
    tied: bool  # the head is the embedding
    cells: tuple[tuple[int, int, int], ...]  # per layer: key/value heads, size of a key, size of a value
    tuples: bool  # the layers return tuples
    entry: tuple[str, ...]  # modules with weights that run before the first layer
    exit: tuple[str, ...]  # and after the last
    layer_numel: int  # weights of the largest layer
    exit_numel: int  # weights that run after the last layer, a tied head included
    eos_tokens: tuple[int, ...]
    dtype: str | None  # the checkpoint's own, as "bfloat16"; None if it does not say

    @classmethod
    def read(cls, directory: str | Path) -> GenericSpec:
        """Look at the model in ``directory``; its weights are not read. Raises CheckpointError for a directory that is
        missing, damaged, or of a model that cannot be cut or would not be decoded exactly."""
        folder = Path(directory)
        fields = _read_json(folder, "config.json")
        _refuse_by_config(folder, fields)
        _refuse_by_files(Checkpoint(folder))
        config, model_class = _classes(folder, fields)
        from stages.generic_probe import probe

        found = probe(folder, config, model_class)
        return cls(
            directory=folder,
            architecture=model_class.__name__,
            vocab_size=int(config.vocab_size),
            hidden_size=found.hidden_size,
            layer_count=len(found.cells),
            context=_context(folder, config),
            tied=found.tied,
            cells=found.cells,
            tuples=found.tuples,
            entry=found.entry,
            exit=found.exit,
            layer_numel=found.layer_numel,
            exit_numel=found.exit_numel,
            eos_tokens=_eos_tokens(folder, config),
            dtype=str(config.dtype).removeprefix("torch.") if config.dtype is not None else None,
        )

    @property
    def head_in_layers(self) -> float:
        """What runs after the last layer, in weights of the largest layer."""
        return self.exit_numel / self.layer_numel

    def skeleton(self, layers: range, dtype: torch.dtype) -> Skeleton:
        """The model with the weights of ``layers`` and of the ends that go with them. Raises CheckpointError."""
        from safetensors import SafetensorError

        from stages.generic_skeleton import build

        config, model_class = _classes(self.directory, _read_json(self.directory, "config.json"))
        ends = set(self.entry if layers.start == 0 else ())
        ends |= set(self.exit if layers.stop == self.layer_count else ())
        if self.tied and ends:  # the two are one tensor, known to the checkpoint by either name
            ends |= self.tied_ends()
        try:
            skeleton, missing = build(model_class, config, self.directory, dtype, layers, ends)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            refuse(f"{self.directory}: the weights cannot be loaded ({_line(error)})", "download the model again")
        if missing:
            refuse(f"{self.directory}: tensor {min(missing)} is missing", "download or export the model again")
        skeleton.notes.tuples = self.tuples
        return skeleton

    def tied_ends(self) -> set[str]:
        """The embedding and the head of a tied model: transformers needs both places to tie them."""
        from stages.generic_skeleton import model_class_of

        pairs = getattr(model_class_of(self.architecture), "_tied_weights_keys", None) or {}
        names = {name.rpartition(".")[0] for pair in pairs.items() for name in pair}
        return names & {*self.entry, *self.exit}


def _line(error: Exception) -> str:
    """The first line of what an exception says."""
    said = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    if not folder.is_dir():
        refuse(f"{folder}: no such model directory", "give a local directory in Hugging Face layout")
    path = folder / name
    if not path.is_file():
        refuse(f"{path} is missing", "give a directory that holds config.json and model.safetensors")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        refuse(f"{path} cannot be read as JSON ({error})", "download or export it again")
    if not isinstance(content, dict):
        refuse(f"{path} must hold an object", "download or export it again")
    return content


def _refuse_by_config(folder: Path, fields: dict[str, Any]) -> None:
    """What needs no look at the model."""
    path = folder / "config.json"
    names = fields.get("architectures")
    if not isinstance(names, list) or not names:
        refuse(f"{path}: architectures is missing", "add it or export the model again")
    if fields.get("is_encoder_decoder"):
        refuse(f"{path}: {names[0]} is an encoder-decoder", USE_ANOTHER)
    if fields.get("quantization_config") is not None:
        refuse(f"{path}: quantised weights are not supported", "use the float32, float16 or bfloat16 release")
    for part in ("vision_config", "audio_config", "text_config"):
        if fields.get(part) is not None:
            refuse(f"{path}: {names[0]} is multimodal ({part})", "use a release of its language model alone")
    foreign = [kind for kind in fields.get("layer_types") or [] if kind not in LAYER_KINDS]
    if foreign:
        refuse(f"{path}: {names[0]} has {foreign[0]} layers, whose state is not keys and values", USE_ANOTHER)


def _refuse_by_files(checkpoint: Checkpoint) -> None:
    """Eight-bit floats would be taken for plain numbers where config.json keeps silent about their scales."""
    for name, stored in checkpoint.tensors.items():
        if stored.dtype.startswith("F8"):
            refuse(f"{stored.path}: tensor {name} is {stored.dtype}", "use the float32, float16 or bfloat16 release")


def _classes(folder: Path, fields: dict[str, Any]) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """transformers' config for the directory and its class of causal language models."""
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from stages.generic_skeleton import model_class_of

    path, kind, name = folder / "config.json", str(fields.get("model_type")), str(fields["architectures"][0])
    if kind not in CONFIG_MAPPING:
        fix = "code from a model's repository is never run" if "auto_map" in fields else "update transformers"
        refuse(f"{path}: model_type {kind} is unknown to the installed transformers", fix)
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if name not in ((names,) if isinstance(names, str) else tuple(names or ())):
        refuse(f"{path}: {name} is not a causal language model of transformers", USE_ANOTHER)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model_class = model_class_of(name)
    except Exception as error:  # whatever a damaged config leads to in a class of transformers
        refuse(f"{path} cannot be used ({_line(error)})", "correct it or export the model again")
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    if getattr(model_class, "_is_stateful", False):
        refuse(f"{path}: {name} has recurrent layers, whose state is not keys and values", USE_ANOTHER)
    return config, model_class


def _context(folder: Path, config: PreTrainedConfig) -> int:
    """Positions that the model was made for, and for which its rotary frequencies do not depend on the text's length:
    in a batch of guesses the longest one would change them for all rows."""
    limit = getattr(config, "max_position_embeddings", None)
    if type(limit) is not int or limit < 1:
        refuse(f"{folder / 'config.json'}: {config.model_type} does not say its context", USE_ANOTHER)
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
        if rope.get("rope_type") in ("longrope", "dynamic"):
            original = rope.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            limit = min(limit, original or limit)
    return limit


def _eos_tokens(folder: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    """The tokens that end a text: generation_config.json's, else config.json's (as ModelSpec has it)."""
    found = getattr(config, "eos_token_id", None)
    if (folder / "generation_config.json").is_file():
        said = _read_json(folder, "generation_config.json").get("eos_token_id")
        found = found if said is None else said
    tokens = [] if found is None else found if isinstance(found, list) else [found]
    if any(type(token) is not int for token in tokens):
        refuse(f"{folder}: eos_token_id must be a token id or a list of them, not {found!r}", "correct it")
    return tuple(tokens)
