"""A GGUF file's metadata as a configuration of transformers.

The tables of names are transformers' own; what they lack, such as a rope that is scaled or the size
of an expert, is read from the metadata and the tensors here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.integrations import ggml
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS, get_gguf_config
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from transformers_api.checkpoints import gguf_encoder, gguf_rope
from transformers_api.checkpoints.headers.gguf_file import GgufHeader, GgufTensor
from transformers_api.errors import ModelLoadFailed

# GGUF's name of an architecture -> that of transformers' tables, and of its model type
TABLES = {
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "gpt-oss": "gpt_oss",
    "minimax-m2": "minimax_m2",
}
TABLE: Any = ggml.GGUF_CONFIG_MAPPING
MODEL_TYPES = {"gemma3": "gemma3_text", "gemma4": "gemma4_text"}
# Field of a configuration -> metadata after the architecture, where transformers' tables lack it
_MORE = {
    "rope_theta": "rope.freq_base",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_MIXTURE = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
# Field -> the tensor whose presence says that it is true
_PRESENT = {
    "attention_bias": "blk.0.attn_output.bias",
    "mlp_bias": "blk.0.ffn_down.bias",
    "use_qkv_bias": "blk.0.attn_q.bias",
    "qk_layernorm": "blk.0.attn_q_norm.weight",
    "new_decoder_architecture": "blk.0.attn_norm_2.weight",
    "bias": "blk.0.attn_qkv.bias",
}
_PRESENT_OF = {
    "llama": ("attention_bias", "mlp_bias"),
    "nemotron": ("attention_bias", "mlp_bias"),
    "stablelm": ("use_qkv_bias", "qk_layernorm"),
    "falcon": ("new_decoder_architecture", "bias"),
}
# Whose linear attention llama.cpp writes with reordered heads.
OTHER_ORDERS = frozenset({"qwen35", "qwen35moe"})
# Rows of transformers' tables that are none, or have no model type.
NO_ARCHITECTURES = frozenset({"general", "tokenizer", "deci", "mistral"})
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}  # which scale attention by the hidden size


def build(header: GgufHeader) -> Any:
    """The configuration of a file's model, without a dtype. Raises ModelLoadFailed.

    An architecture or an entry of the metadata that cannot be read is named.
    """
    architecture = header.metadata["general.architecture"]
    if architecture in OTHER_ORDERS:
        raise ModelLoadFailed(
            f"the architecture {architecture!r} (general.architecture) has its heads in an order "
            "that cannot be read from GGUF; take its safetensors"
        )
    is_encoder = gguf_encoder.is_encoder(header.metadata)
    classes = MODEL_MAPPING_NAMES if is_encoder else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    try:
        fields = _fields(header)
        kind = str(fields["model_type"])
        if kind not in CONFIG_MAPPING or kind not in classes:
            does = "makes vectors" if is_encoder else "continues its own text"
            raise ModelLoadFailed(
                f"the architecture {architecture!r} (general.architecture) has no model here that "
                f"{does}"
            )
        config: Any = CONFIG_MAPPING[kind].from_dict(fields)
        gguf_rope.apply(config, header)
        config.validate_rope()
    except ModelLoadFailed:
        raise
    except Exception as error:  # the entries are a stranger's
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ModelLoadFailed(f"its metadata makes no configuration: {reason}") from error
    config.architectures = [str(classes[kind])]
    return config


def _fields(header: GgufHeader) -> dict[str, Any]:
    architecture = header.metadata["general.architecture"]
    tensors = {tensor.name: tensor for tensor in header.tensors}
    table = TABLES.get(architecture, architecture)
    if architecture in gguf_encoder.MODEL_TYPES:
        own = gguf_encoder.fields(architecture, header.metadata, tensors)
        return {**own, **_vocabulary(tensors)}
    if architecture in GGUF_CONFIG_ARCHS:
        tokens = header.metadata.get("tokenizer.ggml.tokens")
        counted = {**header.metadata, "tokenizer.ggml.tokens": len(tokens) if tokens else None}
        return {**get_gguf_config(counted, tuple(tensors)), **_vocabulary(tensors)}
    if table in TABLE and table not in NO_ARCHITECTURES:
        return _by_table(architecture, table, header.metadata, tensors)
    readable = {*TABLE, *GGUF_CONFIG_ARCHS} - NO_ARCHITECTURES
    names = sorted({name: ours for ours, name in TABLES.items()}.get(n, n) for n in readable)
    raise ModelLoadFailed(
        f"the architecture {architecture!r} (general.architecture) cannot be read from GGUF, only "
        f"{', '.join(names)}"
    )


def _by_table(
    architecture: str, table: str, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]
) -> dict[str, Any]:
    names = TABLE[table]
    own = {
        name: _single(f"{architecture}.{name}", metadata[f"{architecture}.{name}"])
        for name in {*names, *_MORE.values(), *_MIXTURE.values(), "attention.key_length"}
        if f"{architecture}.{name}" in metadata
    }
    fields: dict[str, Any] = dict(ggml.GGUF_CONFIG_DEFAULTS_MAPPING.get(table, {}))
    fields |= {names[key]: value for key, value in own.items() if names.get(key) is not None}
    for key, name in TABLE["tokenizer"].items():
        if f"tokenizer.{key}" in metadata:
            fields[name] = metadata[f"tokenizer.{key}"]
    is_mixtral = architecture == "llama" and bool(own.get("expert_count"))
    fields["model_type"] = "mixtral" if is_mixtral else MODEL_TYPES.get(architecture, table)
    fields["tie_word_embeddings"] = "output.weight" not in tensors
    fields |= _vocabulary(tensors)
    standard = _standard(str(fields["model_type"]))
    for name, key in _MORE.items():
        is_known = name in standard or (name == "rope_theta" and "rope_parameters" in standard)
        if key in own and is_known:
            fields.setdefault(name, own[key])
    for name in _PRESENT_OF.get(architecture, ()):
        fields[name] = _PRESENT[name] in tensors
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields.setdefault(name, _inside(standard.get(name), fields["vocab_size"]))
    return (
        fields | _heads(architecture, own, standard, fields) | _special(architecture, own, tensors)
    )


def _inside(index: Any, vocab_size: int) -> Any:
    """A token of the class, which may be one of a larger vocabulary."""
    return index if not isinstance(index, int) or index < vocab_size else None


def _standard(model_type: str) -> dict[str, Any]:
    if model_type not in CONFIG_MAPPING:
        return {}
    kind: Any = CONFIG_MAPPING[model_type]  # which is imported by this alone
    fields: dict[str, Any] = kind().to_dict()
    return fields


def _single(key: str, value: Any) -> Any:
    """The one value of an entry that may be an array with one for each layer."""
    if not isinstance(value, list) or not value:
        return value
    if any(each != value[0] for each in value[1:]):
        raise ModelLoadFailed(f"{key} is another one in each layer, which cannot be read")
    return value[0]


def _vocabulary(tensors: Mapping[str, GgufTensor]) -> dict[str, Any]:
    if (embedding := tensors.get("token_embd.weight")) is None or len(embedding.shape) != 2:
        raise ModelLoadFailed("tensor token_embd.weight is missing")
    return {"vocab_size": embedding.shape[0]}


def _heads(
    architecture: str,
    own: Mapping[str, Any],
    standard: Mapping[str, Any],
    fields: Mapping[str, Any],
) -> dict[str, Any]:
    """Numbers and sizes of heads, whose defaults in the format are not those of the classes."""
    heads, made = own.get("attention.head_count"), dict[str, Any]()
    if not isinstance(heads, int) or heads < 1:
        return made
    for name in ("num_key_value_heads", "num_kv_heads"):
        if name in standard:
            made[name] = own.get("attention.head_count_kv", heads)
    if "head_dim" in standard and "head_dim" not in fields:
        size = own.get("attention.key_length", fields["hidden_size"] // heads)
        made["head_dim"] = size
    elif "attention.key_length" in own and architecture == "llama":
        made["head_dim"] = own["attention.key_length"]
    usual = (standard.get("rope_parameters") or {}).get("partial_rotary_factor")
    if usual is not None and "rope.dimension_count" in own:
        size = own.get("attention.key_length", fields["hidden_size"] // heads)
        share = own["rope.dimension_count"] / size
        made |= {"partial_rotary_factor": share} if share != usual else {}
    return made


def _special(
    architecture: str, own: Mapping[str, Any], tensors: Mapping[str, GgufTensor]
) -> dict[str, Any]:
    """The fields that only one architecture has."""
    match architecture:
        case "llama" if own.get("expert_count"):  # as llama.cpp's converter writes Mixtral
            return {name: own[key] for name, key in _MIXTURE.items()}
        case "gpt2":
            usual = 4 * own["embedding_length"]
            inner = own.get("feed_forward_length", usual)
            fields = {"n_positions": tensors["position_embd.weight"].shape[0]}
            return fields if inner == usual else {**fields, "n_inner": inner}
        case "stablelm":
            return {"use_parallel_residual": not any("ffn_norm" in name for name in tensors)}
        case "gemma2" | "gemma3":
            heads = own.get("attention.head_count")
            is_largest = own.get("block_count") == GEMMA_27B_LAYERS[architecture]
            size = (
                own["embedding_length"] // heads if is_largest else own.get("attention.key_length")
            )
            return {} if size is None else {"query_pre_attn_scalar": size}
        case "falcon":
            if own.get("attention.head_count_kv", 1) != 1:  # its fused weights lie in another order
                raise ModelLoadFailed(
                    "a falcon with several heads of keys (attention.head_count_kv) cannot be read "
                    "from GGUF; take its safetensors"
                )
            return {"multi_query": True}
        case "minimax-m2":
            kinds = {0: "none", 1: "softmax", 2: "sigmoid"}
            return {"scoring_func": kinds.get(own.get("expert_gating_func", 2), "softmax")}
        case "gemma4":
            return {"eos_token_id": [1, 106, 50]}
    return {}
