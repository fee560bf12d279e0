"""GGUF files of encoders: what their metadata says, as files of transformers and of its sisters.

A file whose ``pooling_type`` names a pooling is one of sentence-transformers' kind: its folder gets
``modules.json``, the pooling, and vectors of length one, which is what llama.cpp makes of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers_api.checkpoints.headers.gguf_file import GgufHeader, GgufTensor
from transformers_api.errors import ModelLoadFailed

POOLINGS = {1: "mean", 2: "cls", 3: "lasttoken"}
NO_POOLING, RANK = 0, 4
# Architectures that only encode, and what each is in transformers.
MODEL_TYPES = {"bert": "bert", "nomic-bert": "nomic_bert"}
# Of encoders that have no class here, or another one than llama.cpp's.
_OTHERS = ("-bert", "bert-", "gemma-embedding", "t5encoder", "eurobert", "neo-bert")
_MODULES = (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))


def is_encoder(metadata: Mapping[str, Any]) -> bool:
    """True for a file whose vectors are wanted. Raises ModelLoadFailed for one of a reranker."""
    architecture = str(metadata.get("general.architecture"))
    kind = metadata.get(f"{architecture}.pooling_type", NO_POOLING)
    if kind == RANK:
        raise ModelLoadFailed(
            f"{architecture}.pooling_type is {RANK}: a reranker cannot be read from GGUF; take its "
            "safetensors"
        )
    if architecture in MODEL_TYPES:
        return True
    if any(part in architecture for part in _OTHERS):
        raise ModelLoadFailed(
            f"the architecture {architecture!r} (general.architecture) of an encoder cannot be "
            f"read from GGUF, only {', '.join(MODEL_TYPES)}; take its safetensors"
        )
    return kind in POOLINGS


def fields(
    architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]
) -> dict[str, Any]:
    """The configuration of an architecture of MODEL_TYPES. Raises KeyError, ModelLoadFailed."""

    def own(name: str) -> Any:
        return metadata[f"{architecture}.{name}"]

    made: dict[str, Any] = {
        "model_type": MODEL_TYPES[architecture],
        "hidden_size": own("embedding_length"),
        "num_hidden_layers": own("block_count"),
        "num_attention_heads": own("attention.head_count"),
        "intermediate_size": own("feed_forward_length"),
        "layer_norm_eps": own("attention.layer_norm_epsilon"),
        "max_position_embeddings": own("context_length"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id", 0),
        "type_vocab_size": _rows(tensors, "token_types.weight"),
    }
    if architecture == "bert":
        made["max_position_embeddings"] = _rows(tensors, "position_embd.weight")
    elif "moe_every_n_layers" in " ".join(metadata):
        raise ModelLoadFailed("a nomic-bert with experts cannot be read from GGUF")
    else:
        theta = own("rope.freq_base")
        made["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    return made


def _rows(tensors: Mapping[str, GgufTensor], name: str) -> int:
    if name not in tensors:
        raise ModelLoadFailed(f"tensor {name} is missing")
    return tensors[name].shape[0]


def sources(name: str, tensors: Mapping[str, GgufTensor]) -> list[str]:
    """The tensors that a nomic-bert's parameter is made of; fused ones are cut by ``parts``."""
    stem, _, suffix = name.rpartition(".")
    pieces = stem.split(".")
    if len(pieces) < 3 or pieces[0] != "layers":
        return []
    own = {
        "self_attn.q_proj": "attn_qkv",
        "self_attn.k_proj": "attn_qkv",
        "self_attn.v_proj": "attn_qkv",
        "post_attention_layernorm": "attn_output_norm",
        "post_mlp_layernorm": "layer_output_norm",
    }.get(".".join(pieces[2:]))
    if own is None or (source := f"blk.{pieces[1]}.{own}.{suffix}") not in tensors:
        return []
    return [source]


def third(name: str) -> int | None:
    """The part of a fused tensor that a parameter is: 0, 1 or 2 of queries, keys and values."""
    parts = [f".self_attn.{letter}_proj." for letter in "qkv"]
    return next((place for place, part in enumerate(parts) if part in name), None)


def write_modules(header: GgufHeader, folder: Path) -> None:
    """The files of sentence-transformers for a file's pooling."""
    architecture = header.metadata["general.architecture"]
    kind = header.metadata.get(f"{architecture}.pooling_type", 1)
    if kind not in POOLINGS:
        raise ModelLoadFailed(
            f"{architecture}.pooling_type is {kind}, which is none of "
            f"{', '.join(f'{number} ({name})' for number, name in POOLINGS.items())}"
        )
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{step}"}
        for i, (step, path) in enumerate(_MODULES)
    ]
    (folder / "modules.json").write_text(json.dumps(entries) + "\n")
    (folder / _MODULES[1][1]).mkdir()
    pooling = {"pooling_mode": POOLINGS[kind]}
    (folder / _MODULES[1][1] / "config.json").write_text(json.dumps(pooling) + "\n")
    shape = {"max_seq_length": header.metadata.get(f"{architecture}.context_length")}
    (folder / "sentence_bert_config.json").write_text(json.dumps(shape) + "\n")
