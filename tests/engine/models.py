"""Tiny random models of many architectures, and what ``generate`` says about them."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers as tf

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
MIXED = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
NO_GQA = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}

BATCHED = {
    "llama": lambda: tf.LlamaConfig(**SIZES, **IDS),
    "qwen3": lambda: tf.Qwen3Config(**SIZES, **IDS, head_dim=8),
    "gpt2": lambda: tf.GPT2Config(**GPT, bos_token_id=1, eos_token_id=2),
    "mistral-window-8": lambda: tf.MistralConfig(**SIZES, **IDS, sliding_window=8),
    "gemma2": lambda: tf.Gemma2Config(**SIZES, **IDS, **MIXED, head_dim=8),
    "gemma3": lambda: tf.Gemma3TextConfig(**SIZES, **IDS, **MIXED, head_dim=8),
    "mixtral": lambda: tf.MixtralConfig(**SIZES, **IDS, num_local_experts=4),
    "gpt-neox": lambda: tf.GPTNeoXConfig(**NO_GQA, **IDS),
    "opt": lambda: tf.OPTConfig(
        vocab_size=97,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        **IDS,
    ),
    "gpt-oss-sinks": lambda: tf.GptOssConfig(
        **{**SIZES, "max_position_embeddings": 4096},
        **IDS,
        **MIXED,
        head_dim=8,
        num_local_experts=4,
    ),
}
TOGETHER = {  # in a batch too, in ways of their own
    "mamba": lambda: tf.MambaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, **IDS
    ),
    "conv-hybrid": lambda: tf.Lfm2Config(
        **{**SIZES, "num_hidden_layers": 2}, **IDS, layer_types=["conv", "full_attention"]
    ),
    "bloom-alibi": lambda: tf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
}
SEQUENTIAL = {
    "recurrent-gemma": lambda: tf.RecurrentGemmaConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        lru_width=32,
        attention_window_size=8,
        **IDS,
    ),
    "gpt-neo-local": lambda: tf.GPTNeoConfig(
        vocab_size=97,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt-1-without-cache": lambda: tf.OpenAIGPTConfig(**{**GPT, "n_layer": 2}, eos_token_id=2),
    "rwkv": lambda: tf.RwkvConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        attention_hidden_size=32,
        eos_token_id=2,
    ),
}
ON_KERNELS = {"gpt-neo-local"}  # of these those that the kernels batch


@functools.cache
def tiny_model(name: str) -> Any:
    """One random model per name and process."""
    torch.manual_seed(0)
    config = (BATCHED | TOGETHER | SEQUENTIAL)[name]()
    return tf.AutoModelForCausalLM.from_config(config).eval()


def prompts_of(count: int) -> list[list[int]]:
    """Random prompts of 2, 7, 12, … tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 90, (2 + 5 * i,), generator=generator).tolist() for i in range(count)]


def generate(model: Any, prompt: list[int], count: int) -> list[int]:
    """The next ``count`` tokens by transformers' own greedy ``generate``."""
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt], device=model.device),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return output[0, len(prompt) :].tolist()


def generated(name: str, prompt: list[int], count: int) -> list[int]:
    """The same of a named model; worked out once, for it is what takes longest in many tests."""
    return list(_generated(name, tuple(prompt), count))


@functools.cache
def _generated(name: str, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    return tuple(generate(tiny_model(name), list(prompt), count))
