"""A folder of safetensors in bfloat16 with random weights, for memory and speed at real sizes.

    python -m benchmarks.random_safetensors 8b build/8b

Shapes: that of Llama 3 8B (8.0 billion weights), or a Qwen3 mixture of 64 experts, 8 for a token
(``moe``, 6.9 billion). Each weight is one of sixteen numbers, which int4 can say: of noise it keeps
too little for a load to be trusted. The tokenizer is that of the built-in model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.machine import default_model_folder

SHARD = 1 << 30  # bytes, about
POOL = 33_554_467  # random numbers, a prime: rows do not repeat each other
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
COMMON: dict[str, Any] = {
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "moe_intermediate_size": 1024,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 49152,
    },
}


def write(shape: str, folder: Path) -> None:
    """Write the folder, shard by shard."""
    folder.mkdir(parents=True)
    config = SHAPES[shape] | COMMON
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in TOKENIZER:
        if (default_model_folder() / name).is_file():
            shutil.copy(default_model_folder() / name, folder)
    drawn = torch.randint(-8, 8, (POOL,), generator=torch.Generator().manual_seed(0))
    pool, at = (drawn / 256).bfloat16(), 0
    places: dict[str, str] = {}
    for number, sizes in enumerate(_shards(config), 1):
        file, shard = f"model-{number:05d}.safetensors", dict[str, Tensor]()
        for name, size in sizes.items():
            count = torch.Size(size).numel()
            first = pool[at : at + count]
            others = pool.repeat(-(-(count - len(first)) // POOL))[: count - len(first)]
            rows = torch.cat([first, others]).view(size)
            shard[name] = rows if len(size) > 1 else torch.ones(size, dtype=torch.bfloat16)
            at = (at + count) % POOL
        save_file(shard, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shards(config: dict[str, Any]) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors of each shard with their sizes."""
    shard: dict[str, tuple[int, ...]] = {}
    for name, size in _tensors(config):
        shard[f"{name}.weight"] = size
        if sum(2 * torch.Size(each).numel() for each in shard.values()) > SHARD:
            yield shard
            shard = {}
    yield shard


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, head, tokens = config["hidden_size"], config["head_dim"], config["vocab_size"]
    queries, keys = (config[f"num_{of}_heads"] * head for of in ("attention", "key_value"))
    experts, inner = config.get("num_experts", 0), config["intermediate_size"]
    yield "model.embed_tokens", (tokens, width)
    for layer in range(config["num_hidden_layers"]):
        own = f"model.layers.{layer}"
        yield f"{own}.self_attn.q_proj", (queries, width)
        yield f"{own}.self_attn.k_proj", (keys, width)
        yield f"{own}.self_attn.v_proj", (keys, width)
        yield f"{own}.self_attn.o_proj", (width, queries)
        if experts:
            yield f"{own}.self_attn.q_norm", (head,)
            yield f"{own}.self_attn.k_norm", (head,)
            yield f"{own}.mlp.gate", (experts, width)
        for part in [f"mlp.experts.{n}" for n in range(experts)] or ["mlp"]:
            yield f"{own}.{part}.gate_proj", (inner, width)
            yield f"{own}.{part}.up_proj", (inner, width)
            yield f"{own}.{part}.down_proj", (width, inner)
        yield f"{own}.input_layernorm", (width,)
        yield f"{own}.post_attention_layernorm", (width,)
    yield "model.norm", (width,)
    yield "lm_head", (tokens, width)


def main() -> None:
    """Write a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    write(options.shape, options.folder)


if __name__ == "__main__":
    main()
