"""Names of tensors in GGUF files, by the names that the model's code gives them."""

from __future__ import annotations

from stages.checkpoint.checkpoint import EMBEDDING, HEAD, NORM

ENDS = {EMBEDDING: "token_embd.weight", NORM: "output_norm.weight", HEAD: "output.weight"}
PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
EXPERT_PARTS = {
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    "w1": "ffn_gate", "w3": "ffn_up", "w2": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """What GGUF files call the tensor ``name``, which is no expert's."""
    if name in ENDS:
        return ENDS[name]
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def expert_name(name: str) -> tuple[str, str, int] | None:
    """Where an expert's matrix ``name`` may be: the tensor of all experts, a tensor of its own as older files have it,
    and the expert's number. None for a tensor that is no expert's."""
    if ".experts." not in name:
        return None
    layer, expert, part = name.split(".")[2], *name.split(".experts.")[1].split(".")[:2]
    known = EXPERT_PARTS[part]
    return f"blk.{layer}.{known}_exps.weight", f"blk.{layer}.{known}.{expert}.weight", int(expert)
