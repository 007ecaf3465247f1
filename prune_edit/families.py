"""The table of model families: names and axes as data.

The only home of Hugging Face attribute names outside `modeling/`. A new family is a new row and a
pico-model test. Names are module paths; a weight's tensor name is `{layers}.{i}.{path}.weight`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from prune_edit.errors import UnsupportedFamilyError

Flag = str | bool
"""Whether projections have biases: always, never, or as a flag of the configuration says."""


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps what prune-edit touches.

    `transposed` weights are (in, out), as GPT-2's Conv1D; others (out, in), as nn.Linear.
    `queries`, `keys` and `values` are equal where one fused projection holds all three: first all
    queries, then all keys, then all values; or, where `grouped_qkv`, for each KV head in turn its
    queries, its key and its value.
    """

    model_type: str
    layers: str
    attention: str  # the attention module of a layer
    ffn: str | None  # the FFN module of a layer; None where its projections are the layer's own
    queries: str
    keys: str
    values: str
    attention_output: str  # its input is the concatenated heads
    ffn_inputs: tuple[str, ...]  # gate and up, or the only one
    ffn_output: str  # its input is the neurons' coefficients
    ffn_norm: str | None  # what reads x + A (eq. 1) in a layer; None: the FFN runs beside attention
    attention_norms: tuple[str, ...]  # what reads x before attention: the first that is there
    ffn_reads: tuple[str, ...]  # what reads the stream before the FFN: the first that is there
    final_norm: str
    embedding: str
    unembedding: str
    heads_key: str  # configuration names
    kv_heads_key: str | None
    width_key: str
    layers_key: str
    positions_key: str
    biases: tuple[
        Flag, Flag, Flag
    ]  # of queries, keys and values; attention's output; all of the FFN
    transposed: bool = False
    rms_norm: bool = True
    rotary: str | None = None  # the module that makes rotary angles, where positions are rotary
    rotary_key: str = "rope_type"  # of that module: how the angles are made
    activation_key: str = "hidden_act"
    window_key: str = "sliding_window"  # positions that sliding attention sees, the own one too
    kinds_key: str = "layer_types"  # per layer, whether attention is full or sliding
    all_sliding: bool = False  # where no kinds are given and there is a window, every layer slides
    norm_offset: float = 0.0  # added to an RMSNorm's weight: Gemma stores it less one
    grouped_qkv: bool = False
    fused_ffn: bool = False  # gate and up are one projection, in that order
    ffn_output_norm: str | None = None  # an RMSNorm between the FFN's output and the residual
    attention_output_norm: str | None = None  # the same for attention's output
    final_projection: str | None = None  # between the final norm and the unembedding, if there
    softcap_key: str | None = None  # logits are cap * tanh(logits / cap)
    single_kv_keys: tuple[str, str] | None = (
        None  # one KV head, if the first flag and not the second
    )
    refused: tuple[tuple[str, bool], ...] = ()  # flags, and the setting that is not supported
    default_bias: bool = False  # what a flag of `biases` is where the configuration lacks it
    qk_norms: tuple[str, str] | None = None  # norms of queries and keys, part of attention
    joint_qk_norms: bool = False  # those span all heads, so queries and keys stay whole
    own_head_dim: bool = True  # the configuration can say E; else it is D / H
    heads_divide: bool = False  # stock code refuses head counts that do not divide D
    same_as: tuple[str, ...] = ()  # model types that compute the same where both can hold it

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
    attention_norms=("input_layernorm",),
    ffn_reads=("post_attention_layernorm",),
    final_norm="model.norm",
    embedding="model.embed_tokens",
    unembedding="lm_head",
    heads_key="num_attention_heads",
    kv_heads_key="num_key_value_heads",
    width_key="intermediate_size",
    layers_key="num_hidden_layers",
    positions_key="max_position_embeddings",
    biases=("attention_bias", "attention_bias", "mlp_bias"),
    rotary="model.rotary_emb",
    heads_divide=True,
    same_as=("mistral",),
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
    attention_norms=("ln_1",),
    ffn_reads=("ln_2",),
    final_norm="transformer.ln_f",
    embedding="transformer.wte",
    unembedding="lm_head",
    heads_key="n_head",
    kv_heads_key=None,
    width_key="n_inner",
    layers_key="n_layer",
    positions_key="n_positions",
    biases=(True, True, True),
    transposed=True,
    rms_norm=False,
    own_head_dim=False,
    heads_divide=True,
)

# As Llama, but for biases of the FFN, and any number of heads.
_GATED = replace(
    _LLAMA, biases=("attention_bias", "attention_bias", False), heads_divide=False, same_as=()
)
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_GEMMA2 = replace(
    _GATED,
    model_type="gemma2",
    heads_divide=True,
    ffn_norm="pre_feedforward_layernorm",
    ffn_reads=("pre_feedforward_layernorm",),
    ffn_output_norm="post_feedforward_layernorm",
    attention_output_norm="post_attention_layernorm",
    norm_offset=1.0,
    softcap_key="final_logit_softcapping",
    refused=(("use_bidirectional_attention", True),),
)
_GPTJ = replace(
    _GPT2,
    model_type="gptj",
    queries="attn.q_proj",
    keys="attn.k_proj",
    values="attn.v_proj",
    attention_output="attn.out_proj",
    ffn_inputs=("mlp.fc_in",),
    ffn_output="mlp.fc_out",
    ffn_norm=None,
    ffn_reads=("ln_1",),
    transposed=False,
    biases=(False, False, True),
)
_NEOX = Family(
    model_type="gpt_neox",
    layers="gpt_neox.layers",
    attention="attention",
    ffn="mlp",
    queries="attention.query_key_value",
    keys="attention.query_key_value",
    values="attention.query_key_value",
    attention_output="attention.dense",
    ffn_inputs=("mlp.dense_h_to_4h",),
    ffn_output="mlp.dense_4h_to_h",
    ffn_norm=None,  # `use_parallel_residual`; without it, x + A is the same sum
    attention_norms=("input_layernorm",),
    ffn_reads=("post_attention_layernorm",),
    final_norm="gpt_neox.final_layer_norm",
    embedding="gpt_neox.embed_in",
    unembedding="lm_head",
    heads_key="num_attention_heads",
    kv_heads_key=None,
    width_key="intermediate_size",
    layers_key="num_hidden_layers",
    positions_key="max_position_embeddings",
    biases=("attention_bias", "attention_bias", True),
    default_bias=True,
    rms_norm=False,
    grouped_qkv=True,
    own_head_dim=False,
    heads_divide=True,
)
_FALCON = replace(
    _NEOX,
    model_type="falcon",
    layers="transformer.h",
    attention="self_attention",
    queries="self_attention.query_key_value",
    keys="self_attention.query_key_value",
    values="self_attention.query_key_value",
    attention_output="self_attention.dense",
    final_norm="transformer.ln_f",
    attention_norms=("ln_attn", "input_layernorm"),
    ffn_reads=("ln_mlp", "post_attention_layernorm", "input_layernorm"),
    embedding="transformer.word_embeddings",
    kv_heads_key="num_kv_heads",
    width_key="ffn_hidden_size",
    single_kv_keys=("multi_query", "new_decoder_architecture"),
    biases=("bias", "bias", "bias"),
    default_bias=False,
)
_OPT = replace(
    _GATED,
    model_type="opt",
    layers="model.decoder.layers",
    ffn=None,
    attention_output="self_attn.out_proj",
    ffn_inputs=("fc1",),
    ffn_output="fc2",
    ffn_norm="final_layer_norm",
    attention_norms=("self_attn_layer_norm",),
    ffn_reads=("final_layer_norm",),
    final_norm="model.decoder.final_layer_norm",
    embedding="model.decoder.embed_tokens",
    kv_heads_key=None,
    width_key="ffn_dim",
    biases=("enable_bias", "enable_bias", "enable_bias"),
    default_bias=True,
    rms_norm=False,
    own_head_dim=False,
    heads_divide=True,
    final_projection="model.decoder.project_out",
    # Without its final norm, or with norms after the sums, there is no stream to the unembedding.
    refused=(("do_layer_norm_before", False), ("_remove_final_layer_norm", True)),
)

STOCK = (
    _LLAMA,
    replace(
        _GATED,
        model_type="mistral",
        biases=(False, False, False),
        all_sliding=True,
        same_as=("llama",),
    ),
    _GPT2,
    replace(_GATED, model_type="qwen2", biases=(True, False, False), same_as=("llama",)),
    replace(_GATED, model_type="qwen3", qk_norms=_QK_NORMS),
    replace(
        _GATED,
        model_type="smollm3",
        biases=_LLAMA.biases,
        rotary=None,  # some of its layers have no positions
    ),
    replace(
        _GATED,
        model_type="phi3",
        biases=(False, False, False),
        queries="self_attn.qkv_proj",
        keys="self_attn.qkv_proj",
        values="self_attn.qkv_proj",
        ffn_inputs=("mlp.gate_up_proj",),
        fused_ffn=True,
    ),
    # No norm before the FFN: the FFN itself reads x + A.
    replace(
        _GATED,
        model_type="olmo2",
        ffn_norm="mlp",
        attention_norms=(),
        ffn_reads=("mlp",),
        ffn_output_norm="post_feedforward_layernorm",
        attention_output_norm="post_attention_layernorm",
        qk_norms=_QK_NORMS,
        joint_qk_norms=True,
    ),
    _GEMMA2,
    replace(_GEMMA2, model_type="gemma3_text", qk_norms=_QK_NORMS),
    _GPTJ,
    _NEOX,
    _FALCON,
    _OPT,
)
FAMILIES: dict[str, Family] = {
    row.model_type: row
    for stock in STOCK
    for row in (stock, replace(stock, model_type=f"pruned_{stock.model_type}"))
}


def family_of(model_type: str) -> Family:
    """The row for a configuration's `model_type`. Raises UnsupportedFamilyError."""
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise unsupported(model_type, "has no row in the table of families") from None


def unsupported(model_type: str, reason: str) -> UnsupportedFamilyError:
    """The error for a model without a row, naming those that have one."""
    known = ", ".join(row.model_type for row in STOCK)
    return UnsupportedFamilyError(
        f"model family {model_type!r} is not supported: it {reason}; supported are {known}, "
        "and the pruned forms of these"
    )
