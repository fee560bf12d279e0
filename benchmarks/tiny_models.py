"""Tiny configurations of every causal language model of the installed transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 128
CONTEXT = 256
MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    "original_max_position_embeddings": 24,
    "factor": 10.0,
}
_LONG = {"rope_parameters": _LONG_ROPE, "original_max_position_embeddings": 24}
_HALF_LONG = _LONG_ROPE | {"short_factor": [1.0] * 4, "long_factor": [1.5, 3.0, 5.0, 8.0]}
_SCALED = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
# Cases of model types: ropes that depend on the length, windows that the default lacks.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3, longrope": ("phi3", {**_LONG, "sliding_window": None}),
    "phi3, longrope and a window": ("phi3", {**_LONG, "sliding_window": 16}),
    "phi4_multimodal, longrope": ("phi4_multimodal", _LONG),
    "phimoe, longrope": (
        "phimoe",
        {
            "rope_parameters": {**_LONG_ROPE, "short_mscale": 1.1, "long_mscale": 1.3},
            "original_max_position_embeddings": 24,
        },
    ),
    "minicpm3, longrope": ("minicpm3", {"rope_parameters": _HALF_LONG}),
    "llama, longrope": ("llama", {"rope_parameters": _LONG_ROPE}),
    "gemma3_text, longrope": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": _LONG_ROPE, "sliding_attention": _ROPE}},
    ),
    "llama, dynamic": ("llama", {"rope_parameters": {**_SCALED, "rope_type": "dynamic"}}),
    "llama, yarn": ("llama", {"rope_parameters": {**_SCALED, "rope_type": "yarn"}}),
    "llama, linear": ("llama", {"rope_parameters": {**_SCALED, "rope_type": "linear"}}),
    "llama, llama3": (
        "llama",
        {
            "rope_parameters": {
                **_SCALED,
                "rope_type": "llama3",
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ),
    "qwen2, windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "llama4_text, growing queries": (
        "llama4_text",
        {"floor_scale": 8, "attn_scale": 0.5, "no_rope_layers": [1, 1, 1, 0]},
    ),
    "falcon, alibi": ("falcon", {"alibi": True, "multi_query": False, "num_kv_heads": 4}),
    "falcon, groups of heads": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "bert, decoder": ("bert", {"is_decoder": True}),
    "roberta, decoder": ("roberta", {"is_decoder": True}),
}

NOT_ALONE = {
    "gemma3n": "a part of it needs the packages timm and Pillow",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "they draft for another model, whose keys and values they read",
    ),
}

_SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "decoder_vocab_size"), VOCAB_SIZE),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim"), 64),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "lru_width", "dim"), 64),
    **dict.fromkeys(("attention_hidden_size", "input_embedding_size", "ple_embed_dim"), 64),
    **dict.fromkeys(("output_embedding_size", "backbone_hidden_size", "router_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("ffn_hidden_size", "dff", "dim_ff", "d_inner", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("feed_forward_size", "dense_intermediate_size"), 96),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_attention_heads", "decoder_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "mamba_num_heads", "index_n_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_head", "dim_head", "kv_channels", "swa_head_dim"), 16),
    **dict.fromkeys(("v_head_dim", "qk_nope_head_dim", "linear_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "attention_head_size"), 16),
    **dict.fromkeys(("global_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    "qk_rope_head_dim": 8,
    "rotary_dim": 8,
    "qk_head_dim": 24,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    "zero_expert_num": 2,
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), CONTEXT),
    **dict.fromkeys(("max_target_positions", "context_length", "model_max_length"), CONTEXT),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size"), 16),
    **dict.fromkeys(("window_size", "local_attention", "keep_window_size"), 16),
    **dict.fromkeys(("attention_chunk_size", "swa_window_size"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_d_ssm"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_chunk_size", "chunk_size"), 8),
}
LARGE: dict[str, int] = {  # sizes of about a hundred million weights
    "vocab_size": 16384,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_hidden_layers": 8,
    "max_position_embeddings": 1024,
    "sliding_window": 512,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "kv_lora_rank": 128,
    "q_lora_rank": 192,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
}
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "forced_eos_token_id": None}
_LATENT = {"num_key_value_heads": 4, "head_dim": 8}  # compressed keys and values
_GEMMA = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
}
_DOTS3 = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {**_LATENT, "layer_group_size": 2, "num_nextn_predict_layers": 0},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "blt": {
        "patch_in_forward": False,
        **{
            f"{part}_config": {
                "hidden_size": 32,
                "hidden_size_global": 64,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": CONTEXT,
                "vocab_size": 260,
            }
            for part in ("patcher", "encoder", "decoder", "global")
        },
        "encoder_hash_byte_group_vocab": 100,
        "vocab_size": 260,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": _DOTS3,
    "dots3_note_vision_encoder": {
        "per_layer_config": {},
        "adapter_in_dim": 64,
        "adapter_out_dim": 64,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gemma3n_text": {**_GEMMA, "intermediate_size": [96] * 4, "laurel_rank": 8},
    "gemma4_text": _GEMMA,
    "gemma4_unified_text": _GEMMA,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mamba_n_heads": 8,
        "shared_intermediate_size": 48,
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"] * 2,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "hidden_size": 64, "n_groups": 1},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 1, "mamba_num_heads": 8, "n_group": 1, "topk_group": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 8,
        "hc_lowrank": 8,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 48],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 40,
        "shape_vocab_size": 40,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "xlstm": {"chunk_size": 16, "num_heads": 4, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", *["linear_attention", "hybrid"] * 2],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 8,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", *["linear_attention", "hybrid"] * 2],
        "num_key_value_heads": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(name: str) -> Any:
    """A small configuration of a model type or of one of VARIANTS."""
    model_type, changes = VARIANTS.get(name, (name, {}))
    return CONFIG_MAPPING[model_type](**_fields(CONFIG_MAPPING[model_type], changes))


def shape_100m(name: str) -> Any:
    """A configuration of about a hundred million weights, where its type has the usual sizes."""
    model_type, changes = VARIANTS.get(name, (name, {}))
    kind = CONFIG_MAPPING[model_type]
    fields = _fields(kind, changes)
    layers = LARGE["num_hidden_layers"]
    if "layer_types" in fields:
        fields["layer_types"] = (fields["layer_types"] * layers)[:layers]
    sizes = {name: size for name, size in LARGE.items() if name in fields}
    if "kv_lora_rank" in sizes:  # each head has keys of its own, and head_dim is the rope's
        sizes |= {"num_key_value_heads": LARGE["num_attention_heads"]}
        sizes |= {"head_dim": LARGE["qk_rope_head_dim"]} if "head_dim" in sizes else {}
    return kind(**(fields | sizes))


def random_weights(model: Any) -> Any:
    """``model`` with weights whose answers differ clearly, always the same."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values * 1.3 / parameter.shape[-1] ** 0.5)
    return model.float().eval()


def _fields(kind: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments for a configuration class: its sizes made small, and those of its sections."""
    try:
        defaults = kind().to_dict()
    except Exception:  # one that has no defaults that agree
        defaults = dict(_SIZES)
    specials = iter(range(VOCAB_SIZE - 1, 100, -1))
    fields = {
        name: _ENDS[name] if name in _ENDS else next(specials)
        for name, value in defaults.items()
        if name in _ENDS
        or (name.endswith(("_token_id", "_token_index")) and isinstance(value, int))
    }
    for name, value in defaults.items():
        if name in _SIZES and type(value) is int:
            deep = name in _LAYERS and "layer_types" in defaults
            fields[name] = 4 if deep else _SIZES[name]
    if "kv_lora_rank" in defaults:
        fields |= {name: size for name, size in _LATENT.items() if name in defaults}
    if set(defaults.get("layer_types") or ()) == set(_GEMMA["layer_types"]):
        fields["layer_types"] = _GEMMA["layer_types"]
    return fields | _sections(kind, defaults) | _OVERRIDES.get(kind.model_type, {}) | changes


def _sections(kind: Any, defaults: dict[str, Any]) -> dict[str, Any]:
    """The sections of a configuration, such as text_config, made small."""
    sections: dict[str, Any] = {}
    for name, declared in getattr(kind, "sub_configs", {}).items():
        if isinstance(defaults.get(name), dict):
            model_type = defaults[name].get("model_type")
            is_listed = model_type in CONFIG_MAPPING  # a lazy mapping, whose get() finds nothing
            inner = CONFIG_MAPPING[model_type] if is_listed else declared
            if getattr(inner, "model_type", None):
                sections[name] = {"model_type": inner.model_type, **_fields(inner, {})}
    return sections
