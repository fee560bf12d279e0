"""More tiny random models, for what each shows of itself."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import transformers as tf

from tests.engine.models import BATCHED, GPT, IDS, SEQUENTIAL, SIZES, TOGETHER

MLA = {
    **SIZES,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MORE = {
    "deepseek-mla": lambda: tf.DeepseekV3Config(**MLA, **IDS),
    "llama4-chunked": lambda: tf.Llama4TextConfig(
        **SIZES,
        **IDS,
        head_dim=8,
        intermediate_size_mlp=64,
        num_local_experts=2,
        attention_chunk_size=8,
    ),
    "qwen3-moe": lambda: tf.Qwen3MoeConfig(
        **SIZES, **IDS, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "qwen3-next": lambda: tf.Qwen3NextConfig(
        **{**SIZES, "num_hidden_layers": 4},
        **LINEAR,
        **IDS,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "cohere2": lambda: tf.Cohere2Config(
        **SIZES,
        **IDS,
        logit_scale=0.3,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "granite": lambda: tf.GraniteConfig(
        **SIZES, **IDS, attention_multiplier=0.2, logits_scaling=3.0
    ),
    "phi": lambda: tf.PhiConfig(**SIZES, **IDS),
    "doge": lambda: tf.DogeConfig(**SIZES, **IDS),
    "olmo2": lambda: tf.Olmo2Config(**SIZES, **IDS),
    "gpt-bigcode-mqa": lambda: tf.GPTBigCodeConfig(**GPT, eos_token_id=2),
    "gptj": lambda: tf.GPTJConfig(**GPT, rotary_dim=4, eos_token_id=2),
    "mpt-alibi": lambda: tf.MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4),
    "falcon": lambda: tf.FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, eos_token_id=2
    ),
}
ALL = {**BATCHED, **TOGETHER, **SEQUENTIAL, **MORE}


@functools.cache
def tiny(name: str) -> Any:
    """One random model per name and process; engines take copies."""
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(ALL[name]()).eval()


def sharp(name: str) -> Any:
    """A copy of a random llama, or one like it, whose scores of attention are dozens."""
    model = copy.deepcopy(tiny(name))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 3000
    return model
