"""Whether a model directory holds a decoder that can be cut by its layers, whatever its architecture, and how.

``config.json`` alone settles part of it, and is read with the standard library. The rest is found by probing: the
model is built without weights and run without layers (see generic_probe.py), and each layer is stopped where its
attention begins. What a layer is given must follow from tokens, positions, masks and slots alone: that is tested by
shuffling the rows. Whatever does not fit is refused by name.

This module imports neither torch nor transformers until a directory is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.checkpoint.checkpoint import Checkpoint, reading
from stages.checkpoint.folder import AGAIN, plain, printable, read_config, refuse, said, shown
from stages.checkpoint.spec import CORRECT, MOST, MOST_EXPERTS, eos_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from stages.models.generic_skeleton import Skeleton

LAYER_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
LAYER_COUNTS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}
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
    kv_shapes: tuple[tuple[int, int, int], ...]  # per layer: key/value heads, size of a key, size of a value
    tuples: bool  # the layers return tuples
    entry: tuple[str, ...]  # modules with weights that run before the first layer
    exit: tuple[str, ...]  # and after the last
    layer_numel: int  # weights of the largest layer
    exit_numel: int  # weights that run after the last layer, a tied head included
    eos_tokens: tuple[int, ...]
    dtype: str | None  # the checkpoint's own, as "bfloat16"; None if it does not say

    @classmethod
    def read(cls, directory: str | Path) -> GenericSpec:
        """Probe the model in ``directory``; its weights are not read. Raises CheckpointError for a directory that is
        missing, damaged, or of a model that cannot be cut or would not be decoded exactly."""
        path, fields = read_config(directory)
        _refuse_by_config(path, fields)
        checkpoint = Checkpoint(path.parent, llama=False)
        if checkpoint.quantized.scheme is None:
            _refuse_by_files(checkpoint)
        config, model_class = _classes(path, fields, len(checkpoint.tensors))
        from stages.models.generic_probe import probe
        from stages.models.generic_weights import refuse_by_tensors, whole

        try:
            model = whole(model_class, config)
        except Exception as error:  # whatever a damaged config leads to in a class of transformers
            refuse(f"{path} cannot be used ({said(error)})", CORRECT)
        refuse_by_tensors(path, checkpoint, model)
        found = probe(path, config, model)
        return cls(
            directory=path.parent,
            architecture=model_class.__name__,
            vocab_size=int(config.vocab_size),
            hidden_size=found.hidden_size,
            layer_count=len(found.kv_shapes),
            context=_context(path, config),
            tied=found.tied,
            kv_shapes=found.kv_shapes,
            tuples=found.tuples,
            entry=found.entry,
            exit=found.exit,
            layer_numel=found.layer_numel,
            exit_numel=found.exit_numel,
            eos_tokens=eos_tokens(path, getattr(config, "eos_token_id", None)),
            dtype=str(config.dtype).removeprefix("torch.") if config.dtype is not None else None,
        )

    @property
    def head_in_layers(self) -> float:
        """What runs after the last layer, in weights of the largest layer."""
        return self.exit_numel / self.layer_numel

    def skeleton(self, layers: range, dtype: torch.dtype, is_packed: bool = False) -> Skeleton:
        """The model with the weights of ``layers`` and of the ends that go with them. ``is_packed``: quantised matrices
        are left out, for ``Skeleton.matrix`` to read. Raises CheckpointError."""
        from stages.models.generic_skeleton import build
        from stages.models.generic_weights import Quantized, unread

        path, fields = read_config(self.directory)
        checkpoint = Checkpoint(self.directory, llama=False)
        config, model_class = _classes(path, fields, len(checkpoint.tensors))
        ends = set(self.entry if layers.start == 0 else ())
        ends |= set(self.exit if layers.stop == self.layer_count else ())
        if self.tied and ends:  # the two are one tensor, known to the checkpoint by either name
            ends |= self.tied_ends()
        quantized = Quantized(checkpoint, dtype, is_packed)
        with reading(self.directory):
            weights = unread(checkpoint, quantized)
            skeleton, missing, unlike = build(model_class, config, weights, dtype, layers, ends)
        for name in sorted(missing):
            refuse(f"{self.directory}: tensor {name} is missing", AGAIN)
        for name, stored, wanted in sorted(unlike):
            shapes = f"{list(stored)}, config.json asks for {list(wanted)}"
            refuse(f"{self.directory}: tensor {name} has shape {shapes}", "the two are of different models")
        skeleton.notes.tuples = self.tuples
        skeleton.matrix = quantized.matrix
        return skeleton

    def tied_ends(self) -> set[str]:
        """The embedding and the head of a tied model: transformers needs both places to tie them."""
        from stages.models.generic_skeleton import model_class_of

        pairs = getattr(model_class_of(self.architecture), "_tied_weights_keys", None) or {}
        names = {name.rpartition(".")[0] for pair in pairs.items() for name in pair}
        return names & {*self.entry, *self.exit}


def _refuse_by_config(path: Path, fields: dict[str, Any]) -> None:
    """The checks that need no probe of the model."""
    names = fields.get("architectures")
    if not isinstance(names, list) or not names:
        refuse(f"{path}: architectures is missing", "add it or export the model again")
    name = printable(str(names[0]))
    if fields.get("is_encoder_decoder"):
        refuse(f"{path}: {name} is an encoder-decoder", USE_ANOTHER)
    for part in ("vision_config", "audio_config", "text_config"):
        if fields.get(part) is not None:
            refuse(f"{path}: {name} is multimodal ({part})", "use a release of its language model alone")
    kinds = fields.get("layer_types") or []
    if not isinstance(kinds, list):
        refuse(f"{path}: layer_types must be a list, not {shown(kinds)}", CORRECT)
    foreign = [kind for kind in kinds if not isinstance(kind, str) or kind not in LAYER_KINDS]
    if foreign:
        refuse(f"{path}: {name} has {plain(foreign[0])} layers, whose state is not keys and values", USE_ANOTHER)


def _refuse_by_files(checkpoint: Checkpoint) -> None:
    """Eight-bit floats would be taken for plain numbers where config.json keeps silent about their scales."""
    for name, stored in checkpoint.tensors.items():
        if stored.dtype.startswith("F8"):
            refuse(f"{stored.path}: tensor {name} is {stored.dtype}", "use the float32, float16 or bfloat16 release")


def _classes(path: Path, fields: dict[str, Any], tensor_count: int) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """transformers' config for the directory, whose files hold so many tensors, and its class of causal language
    models."""
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from stages.models.generic_skeleton import model_class_of, quiet

    kind, name = str(fields.get("model_type")), str(fields["architectures"][0])
    if kind not in CONFIG_MAPPING:
        fix = "code from a model's repository is never run" if "auto_map" in fields else "update transformers"
        refuse(f"{path}: model_type {printable(kind)} is unknown to the installed transformers", fix)
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if name not in ((names,) if isinstance(names, str) else tuple(names or ())):
        refuse(f"{path}: {printable(name)} is not a causal language model of transformers", USE_ANOTHER)
    for key, value in fields.items():  # transformers builds a list or a module of each: no number may be beyond reason
        most = tensor_count if key in LAYER_COUNTS else MOST_EXPERTS if "expert" in key else MOST
        if type(value) in (int, float) and not -most <= value <= most:
            refuse(f"{path}: {printable(key)} is {shown(value)}, more than such a model can have", CORRECT)
    try:
        with quiet():
            config: PreTrainedConfig = AutoConfig.from_pretrained(path.parent, local_files_only=True)
        if config.model_type != kind:  # as of a Mistral with layer_types, which is taken for a Ministral
            name = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])
        model_class = model_class_of(name)
    except Exception as error:  # whatever a damaged config leads to in a class of transformers
        refuse(f"{path} cannot be used ({said(error)})", CORRECT)
    for key in ("sliding_window", "attention_chunk_size"):  # one that hides every token decodes noise
        window = getattr(config, key, None)
        if window is not None and (type(window) is not int or window < 1):
            refuse(f"{path}: {key} must be a positive integer, not {shown(window)}", CORRECT)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # the weights are ours to read
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    if getattr(model_class, "_is_stateful", False):
        refuse(f"{path}: {name} has recurrent layers, whose state is not keys and values", USE_ANOTHER)
    return config, model_class


def _context(path: Path, config: PreTrainedConfig) -> int:
    """Positions that the model was made for, and for which its rotary frequencies do not depend on the text's length:
    in a batch of guesses the longest one would change them for all rows."""
    limit = getattr(config, "max_position_embeddings", None)
    if type(limit) is not int or limit < 1:
        refuse(f"{path}: {config.model_type} does not say its context", USE_ANOTHER)
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(value for value in ropes.values() if isinstance(value, dict))):
        if rope.get("rope_type") in ("longrope", "dynamic"):
            original = rope.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None) or limit
            if type(original) is not int or original < 1:
                refuse(f"{path}: original_max_position_embeddings must be a number, not {shown(original)}", CORRECT)
            limit = min(limit, original)
    return limit
