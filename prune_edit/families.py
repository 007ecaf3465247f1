"""The table of model families: names and axes as data.

The only home of Hugging Face attribute names outside `modeling/`. A new family is a new row and a
pico-model test. Names are module paths; a weight's tensor name is `{layers}.{i}.{path}.weight`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from prune_edit.errors import UnsupportedFamilyError


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps what prune-edit touches.

    `transposed` weights are (in, out), as GPT-2's Conv1D; others (out, in), as nn.Linear.
    `queries`, `keys` and `values` are equal where one fused projection holds all three, blocks in
    that order along its output axis.
    """

    model_type: str
    layers: str
    attention: str  # the attention module of a layer
    ffn: str  # the FFN module of a layer
    queries: str
    keys: str
    values: str
    attention_output: str  # its input is the concatenated heads
    ffn_inputs: tuple[str, ...]  # gate and up, or the only one
    ffn_output: str  # its input is the neurons' coefficients
    ffn_norm: str  # norm before the FFN, inside a layer
    final_norm: str
    embedding: str
    unembedding: str
    heads_key: str  # configuration names
    kv_heads_key: str | None
    width_key: str
    layers_key: str
    positions_key: str
    output_bias_keys: tuple[str, str] | None  # flags for biases on the attention and FFN outputs
    transposed: bool = False
    rms_norm: bool = True

    @property
    def fused_qkv(self) -> bool:
        """Whether queries, keys and values are one projection."""
        return self.queries == self.keys == self.values

    @property
    def base_type(self) -> str:
        """The stock `model_type` a pruned one descends from."""
        return self.model_type.removeprefix("pruned_")


_LLAMA = Family(
    model_type="llama",
    layers="model.layers",
    attention="self_attn",
    ffn="mlp",
    queries="self_attn.q_proj",
    keys="self_attn.k_proj",
    values="self_attn.v_proj",
    attention_output="self_attn.o_proj",
    ffn_inputs=("mlp.gate_proj", "mlp.up_proj"),
    ffn_output="mlp.down_proj",
    ffn_norm="post_attention_layernorm",
    final_norm="model.norm",
    embedding="model.embed_tokens",
    unembedding="lm_head",
    heads_key="num_attention_heads",
    kv_heads_key="num_key_value_heads",
    width_key="intermediate_size",
    layers_key="num_hidden_layers",
    positions_key="max_position_embeddings",
    output_bias_keys=("attention_bias", "mlp_bias"),
)
_GPT2 = Family(
    model_type="gpt2",
    layers="transformer.h",
    attention="attn",
    ffn="mlp",
    queries="attn.c_attn",
    keys="attn.c_attn",
    values="attn.c_attn",
    attention_output="attn.c_proj",
    ffn_inputs=("mlp.c_fc",),
    ffn_output="mlp.c_proj",
    ffn_norm="ln_2",
    final_norm="transformer.ln_f",
    embedding="transformer.wte",
    unembedding="lm_head",
    heads_key="n_head",
    kv_heads_key=None,
    width_key="n_inner",
    layers_key="n_layer",
    positions_key="n_positions",
    output_bias_keys=None,
    transposed=True,
    rms_norm=False,
)

_STOCK = (_LLAMA, replace(_LLAMA, model_type="mistral", output_bias_keys=None), _GPT2)
FAMILIES: dict[str, Family] = {
    row.model_type: row
    for stock in _STOCK
    for row in (stock, replace(stock, model_type=f"pruned_{stock.model_type}"))
}


def family_of(model_type: str) -> Family:
    """The row for a configuration's `model_type`. Raises UnsupportedFamilyError."""
    try:
        return FAMILIES[model_type]
    except KeyError:
        known = ", ".join(row.model_type for row in _STOCK)
        raise UnsupportedFamilyError(
            f"model family {model_type!r} is not supported; supported are {known} "
            "and their pruned forms"
        ) from None
