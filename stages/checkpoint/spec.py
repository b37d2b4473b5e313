"""The model's configuration, read from its directory with the standard library alone.

A bad directory must be refused before torch is loaded, so nothing here imports it. Where ``config.json`` leaves a key
out, the default is the one transformers 5 takes for that family: the tokens have to be the same tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from pipeinfer.core.errors import CheckpointError
from stages.checkpoint.folder import has_file, is_gguf_name, plain, printable, read_object, refuse, shown
from stages.checkpoint.model_config import model_config

CORRECT = "correct it or export the model again"
LEAST, MOST = 1e-18, 2**31 - 1  # bounds of any number in a config; numbers beyond are damage
MOST_EXPERTS = 1 << 16
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """The experts that every layer has instead of an MLP: ``count`` of them, ``chosen`` by each row, whose weights are
    divided by their sum if ``is_normalised``. ``block``: what holds the router ``gate`` and the ``experts`` in names
    of tensors; ``gate``, ``up`` and ``down``: an expert's matrices."""

    count: int
    chosen: int
    is_normalised: bool
    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True, slots=True)
class _Family:
    """Properties that follow from the architecture's name, and transformers' defaults for absent keys (None: as many as
    heads)."""

    model_type: str
    kv_head_count: int | None = None
    head_dim: int | None = None  # None: hidden_size / heads
    qkv_bias: bool = False  # always there, whatever the config says
    attention_bias: bool = False  # the config may ask for it, on q, k, v and o
    mlp_bias: bool = False  # the config may ask for it
    qk_norm: bool = False
    eos_token: int | None = None
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    experts: ExpertSpec | None = None


MIXTRAL_EXPERTS = ExpertSpec(8, 2, True, "block_sparse_moe", "w1", "w3", "w2")
FAMILIES = {
    "LlamaForCausalLM": _Family("llama", attention_bias=True, mlp_bias=True, eos_token=2),
    "MistralForCausalLM": _Family("mistral", kv_head_count=8, eos_token=2),
    "Qwen2ForCausalLM": _Family("qwen2", kv_head_count=32, qkv_bias=True),
    "Qwen3ForCausalLM": _Family("qwen3", kv_head_count=32, head_dim=128, attention_bias=True, qk_norm=True),
    "MixtralForCausalLM": _Family(
        "mixtral", kv_head_count=8, eos_token=2, norm_eps=1e-5, rope_theta=1e6, experts=MIXTRAL_EXPERTS
    ),
    "Qwen3MoeForCausalLM": _Family(
        "qwen3_moe", kv_head_count=4, attention_bias=True, qk_norm=True, experts=ExpertSpec(128, 8, False)
    ),
}


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding: its kind (of ROPE_KINDS), its base, and what else that kind needs."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_context: int = 0  # llama3, yarn: positions of pretraining
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    attention_factor: float | None = None  # yarn, as the next five
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder's sizes and variants. ``context`` is max_position_embeddings: no position may reach it. ``window``:
    how many tokens a row sees in layers with a sliding window, itself included; None: always all. LlamaShard has no
    windows, so it is for contexts no longer than that (0: for none). ``experts``: None where layers have one MLP each;
    ``intermediate_size`` is that of an expert else."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_count: int
    head_count: int
    kv_head_count: int
    head_dim: int
    context: int
    norm_eps: float
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeSpec
    eos_tokens: tuple[int, ...]
    dtype: str | None  # the checkpoint's own, as "bfloat16"; None if it does not say
    window: int | None = None
    experts: ExpertSpec | None = None

    @property
    def head_in_layers(self) -> float:
        """Weights of the output head / weights of a layer, without experts that a row has not chosen."""
        mlps, router = (1, 0) if self.experts is None else (self.experts.chosen, self.experts.count)
        attention = 2 * self.head_dim * (self.head_count + self.kv_head_count)
        return self.vocab_size / (attention + 3 * mlps * self.intermediate_size + router)

    @classmethod
    def read(cls, directory: str | Path) -> ModelSpec:
        """Parse ``config.json`` and, if there, ``generation_config.json``. Raises CheckpointError for a directory that
        is missing, damaged, or of a model that would not be decoded exactly."""
        path, content = model_config(directory)
        fields = _Fields(path, content)
        architecture, family = _family(fields)
        layer_count, context = fields.count("num_hidden_layers"), fields.count("max_position_embeddings")
        _refuse_foreign(fields, layer_count)
        head_count = fields.count("num_attention_heads")
        kv_head_count, head_dim = _heads(fields, family, head_count)
        attention_bias = family.attention_bias and fields.flag("attention_bias")
        experts, intermediate_size = _mlp(fields, family)
        return cls(
            architecture=architecture,
            vocab_size=fields.count("vocab_size"),
            hidden_size=fields.count("hidden_size"),
            intermediate_size=intermediate_size,
            layer_count=layer_count,
            head_count=head_count,
            kv_head_count=kv_head_count,
            head_dim=head_dim,
            context=context,
            norm_eps=fields.number("rms_norm_eps", family.norm_eps, below=1),
            tied=fields.flag("tie_word_embeddings"),
            qkv_bias=family.qkv_bias or attention_bias,
            output_bias=attention_bias,
            mlp_bias=family.mlp_bias and fields.flag("mlp_bias"),
            qk_norm=family.qk_norm,
            rope=_rope(fields, family, context),
            eos_tokens=eos_tokens(path, fields.get("eos_token_id", family.eos_token)),
            dtype=_dtype(fields),
            window=_window(fields, family, layer_count),
            experts=experts,
        )


def architecture_of(directory: str | Path) -> str | None:
    """What ``config.json`` calls the model's architecture; None where it is missing or damaged."""
    try:
        names = model_config(directory)[1]["architectures"]
        return str(names[0])
    except (CheckpointError, TypeError, KeyError, IndexError):
        return None


def stored_dtype(directory: str | Path) -> str | None:
    """The dtype of the checkpoint in ``directory``, as "bfloat16"; None if it does not say. Raises CheckpointError."""
    path, content = model_config(directory)
    return _dtype(_Fields(path, content))


def is_llama_family(directory: str | Path) -> bool:
    """Whether ModelSpec is for the model in ``directory``; also for one that is missing or damaged, for ModelSpec says
    so without loading torch."""
    name = architecture_of(directory)
    if name in FAMILIES and FAMILIES[name].model_type == "qwen3_moe":
        return not _is_mixed(_Fields(*model_config(directory)))
    return name in {None, *FAMILIES}


class _Fields:
    """A JSON object with typed access; every error message names the file and the key."""

    def __init__(self, path: Path, content: Any, within: str = "") -> None:
        self.path, self.within = path, within
        if not isinstance(content, dict):
            refuse(f"{path}: {within.rstrip('.')} must be an object, not {shown(content)}", CORRECT)
        self.content: dict[str, Any] = content

    def bad(self, key: str, wanted: str) -> NoReturn:
        refuse(f"{self.path}: {self.within}{key} must be {wanted}", CORRECT)

    def get(self, key: str, default: Any = None) -> Any:
        return self.content.get(key, default)

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; refused when absent without a default, and when null."""
        if key not in self.content and default is None:
            refuse(f"{self.path}: {self.within}{key} is missing", "add it or export the model again")
        value = self.get(key, default)
        if type(value) is not int or not 1 <= value <= MOST:
            most = f" up to {MOST}" if type(value) is int and value > MOST else ""
            self.bad(key, f"a positive integer{most}, not {shown(value)}")
        return value

    def number(self, key: str, default: float | None = None, below: float = MOST) -> float:
        """A positive number; refused when absent without a default, and when null."""
        if key not in self.content and default is None:
            refuse(f"{self.path}: {self.within}{key} is missing", "add it or export the model again")
        value = self.get(key, default)
        if type(value) not in (int, float) or not LEAST <= value < below:
            most = f" below {below}" if below < MOST else ""
            self.bad(key, f"a positive number{most}, not {shown(value)}")
        return float(value)

    def optional(self, key: str) -> float | None:
        """A positive number, or None where it is absent or null."""
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if type(value) is not bool:
            self.bad(key, f"true or false, not {shown(value)}")
        return value


def _family(fields: _Fields) -> tuple[str, _Family]:
    supported = "supported are " + ", ".join(FAMILIES)
    names = fields.get("architectures")
    if not isinstance(names, list) or not names:
        refuse(f"{fields.path}: architectures is missing", supported)
    name = str(names[0])
    family = FAMILIES.get(name)
    if family is None:
        refuse(f"{fields.path}: architecture {printable(name)} is not supported", supported)
    if fields.get("model_type", family.model_type) != family.model_type:
        refuse(f"{fields.path}: model_type {plain(fields.get('model_type'))} is not a {name}", supported)
    return name, family


def _refuse_foreign(fields: _Fields, layer_count: int) -> None:
    """Refuse keys that change the arithmetic in ways that the shard does not implement."""
    for key in ("text_config", "vision_config", "audio_config"):
        if fields.get(key) is not None:
            refuse(f"{fields.path} is of a multimodal model ({key})", "use a release of its language model alone")
    if fields.get("per_layer_config") is not None:
        refuse(f"{fields.path}: per_layer_config is not supported", "use a release of one size for all layers")
    if fields.get("pretraining_tp", 1) not in (None, 1):
        refuse(f"{fields.path}: pretraining_tp {plain(fields.get('pretraining_tp'))} is not supported", "set it to 1")
    act = fields.get("hidden_act", "silu")
    if act != "silu":
        refuse(f"{fields.path}: hidden_act {plain(act)} is not supported", "only silu is")
    types = fields.get("layer_types")
    if types is not None and not isinstance(types, list):
        fields.bad("layer_types", f"a list, not {shown(types)}")
    foreign = [kind for kind in types or [] if kind not in ("full_attention", "sliding_attention")]
    if foreign:
        refuse(f"{fields.path}: layer_types names {plain(foreign[0])}", "only full and sliding attention are supported")
    if types is not None and len(types) != layer_count:
        refuse(f"{fields.path}: layer_types names {len(types)} layers, num_hidden_layers {layer_count}", CORRECT)


def _heads(fields: _Fields, family: _Family, head_count: int) -> tuple[int, int]:
    """The number of key/value heads and the size of a head."""
    nulls = {key for key in ("num_key_value_heads", "head_dim") if key in fields.content and fields.get(key) is None}
    kv_default = None if "num_key_value_heads" in nulls else family.kv_head_count
    kv_heads = kv_default or head_count
    if fields.get("num_key_value_heads") is not None:
        kv_heads = fields.count("num_key_value_heads")
    if head_count % kv_heads:
        refuse(f"{fields.path}: {head_count} heads cannot share {kv_heads} key/value heads", "correct the counts")
    head_dim = None if "head_dim" in nulls else family.head_dim
    if fields.get("head_dim") is not None:
        head_dim = fields.count("head_dim")
    if head_dim is None:
        hidden_size = fields.count("hidden_size")
        if hidden_size % head_count:
            refuse(f"{fields.path}: hidden_size {hidden_size} is no multiple of {head_count} heads", "add head_dim")
        head_dim = hidden_size // head_count
    if head_dim % 2:
        refuse(f"{fields.path}: head_dim {head_dim} is odd", "rotary positions need an even one")
    return kv_heads, head_dim


def _window(fields: _Fields, family: _Family, layer_count: int) -> int | None:
    """See ModelSpec. Absent keys mean what they mean to transformers: a window of 4096 from the 28th layer on."""
    if family.experts is not None:  # one window for all layers, or none
        default = None if family.model_type == "mixtral" else 4096
        is_on = family.model_type == "mixtral" or fields.flag("use_sliding_window")
        given = is_on and fields.get("sliding_window", default) is not None
        return fields.count("sliding_window", default) if given else None
    windowed = "sliding_attention" in (fields.get("layer_types") or [])
    if fields.get("layer_types") is not None:
        pass  # they decide, for Mistral, too: transformers takes it for Ministral then
    elif family.model_type == "mistral":
        windowed = fields.get("sliding_window", 4096) is not None
    elif family.model_type != "llama" and fields.flag("use_sliding_window"):
        first = fields.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            fields.bad("max_window_layers", f"a number of layers, not {shown(first)}")
        windowed = fields.get("sliding_window", 4096) is not None and first < layer_count
    if not windowed:
        return None
    given = family.model_type == "mistral" or (family.model_type != "llama" and fields.flag("use_sliding_window"))
    return fields.count("sliding_window", 4096) if given and fields.get("sliding_window", 4096) is not None else 0


def _mlp(fields: _Fields, family: _Family) -> tuple[ExpertSpec | None, int]:
    """The experts, if there are any, and the width of an MLP."""
    usual = family.experts
    if usual is None:
        return None, fields.count("intermediate_size")
    # transformers reads and writes either name of the count.
    count = fields.count("num_experts" if "num_experts" in fields.content else "num_local_experts", usual.count)
    chosen = fields.count("num_experts_per_tok", usual.chosen)
    if count > MOST_EXPERTS:
        refuse(f"{fields.path}: {count} experts", f"at most {MOST_EXPERTS} are supported")
    if chosen > count:
        refuse(f"{fields.path}: num_experts_per_tok is {chosen}, of {count} experts", CORRECT)
    if family.model_type == "mixtral":
        return replace(usual, count=count, chosen=chosen), fields.count("intermediate_size")
    if _is_mixed(fields):
        refuse(f"{fields.path}: some layers have no experts", "set mlp_only_layers to [] and decoder_sparse_step to 1")
    is_normalised = fields.flag("norm_topk_prob", usual.is_normalised)
    experts = replace(usual, count=count, chosen=chosen, is_normalised=is_normalised)
    return experts, fields.count("moe_intermediate_size", 768)


def _is_mixed(fields: _Fields) -> bool:
    """Whether only some layers of a Qwen3-MoE have experts."""
    return bool(fields.get("mlp_only_layers")) or fields.get("decoder_sparse_step", 1) != 1


def _rope(fields: _Fields, family: _Family, context: int) -> RopeSpec:
    """Old keys (rope_theta, rope_scaling) and new ones (rope_parameters), in transformers' order of precedence."""
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = _Fields(fields.path, fields.get(key) or {}, f"{key}.")
    if {"full_attention", "sliding_attention"} & rope.content.keys():
        refuse(f"{fields.path}: {key} differs by layer type", "only one rotary embedding for all layers is supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KINDS:
        refuse(f"{fields.path}: rope type {plain(kind)} is not supported", "supported are " + ", ".join(ROPE_KINDS))
    for source in (rope, fields):
        if source.get("partial_rotary_factor") not in (None, 1):
            refuse(f"{fields.path}: partial_rotary_factor is not supported", "only models that rotate whole heads are")
    theta = (rope if "rope_theta" in rope.content else fields).number("rope_theta", family.rope_theta)
    if theta <= 1:
        rope.bad("rope_theta", f"above 1, not {theta}")
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind in ("linear", "dynamic"):
        return RopeSpec(kind, theta, rope.number("factor"))
    # Outside the rope's own dict this key wins: transformers reads it again when it builds the frequencies.
    outer = fields if fields.get("original_max_position_embeddings") is not None else rope
    original = outer.count("original_max_position_embeddings", context)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            rope.bad("high_freq_factor", "above low_freq_factor")
        return RopeSpec(kind, theta, rope.number("factor"), original, low, high)
    factor = context / original if "factor" in rope.content and rope.get("factor") is None else rope.number("factor")
    return RopeSpec(
        kind,
        theta,
        factor,
        original,
        attention_factor=rope.optional("attention_factor"),
        mscale=rope.optional("mscale"),
        mscale_all_dim=rope.optional("mscale_all_dim"),
        beta_fast=rope.optional("beta_fast") or 32.0,
        beta_slow=rope.optional("beta_slow") or 1.0,
        truncate=rope.flag("truncate", True),
    )


def eos_tokens(config: Path, found: object) -> tuple[int, ...]:
    """The tokens that end a text: generation_config.json's, else what was ``found`` in config.json or its family.

    (transformers stops nowhere when a generation_config.json without them hides config.json's; nobody wants that.)"""
    path, source = config.with_name("generation_config.json"), config
    if not is_gguf_name(config) and has_file(path):
        stated = read_object(path).get("eos_token_id")
        found, source = (found, source) if stated is None else (stated, path)
    tokens = [] if found is None else found if isinstance(found, list) else [found]
    if any(type(token) is not int or abs(token) > MOST for token in tokens):
        refuse(f"{source}: eos_token_id must be a token id or a list of them, not {shown(found)}", CORRECT)
    return tuple(tokens)


def _dtype(fields: _Fields) -> str | None:
    name = fields.get("dtype") or fields.get("torch_dtype")
    return None if name is None else str(name).removeprefix("torch.")
