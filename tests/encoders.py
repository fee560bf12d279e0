"""Encoders as people publish them, tiny and random: folders in sentence-transformers' format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file
from tokenizers import processors

from tests import tokenizers

WIDTH = 32
SIZES = {
    "vocab_size": 300,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 8}
GEMMA = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
E5 = {"prompts": {"query": "query: ", "passage": "passage: "}}
QWEN = {
    "prompts": {"query": "Instruct: Find answers\nQuery:", "document": ""},
    "default_prompt_name": None,
    "similarity_fn_name": "cosine",
}
TASKS = {
    "prompts": {"query": "task: search | query: ", "document": "title: none | text: "},
    "default_prompt_name": "document",
}
# (model, pooling, dense layers behind it, whether vectors have length one, more files)
Family = tuple[Any, dict[str, Any], Sequence[tuple[int, int]], bool, Mapping[str, Any]]
FAMILIES: dict[str, Family] = {
    "bge": (lambda: tf.BertConfig(**SIZES), {"pooling_mode_cls_token": True}, (), True, {}),
    "minilm": (
        lambda: tf.BertConfig(**SIZES),
        {"pooling_mode_mean_tokens": True},
        (),
        True,
        {"sentence_bert_config": {"max_seq_length": 64, "do_lower_case": True}},
    ),
    "mxbai": (
        lambda: tf.BertConfig(**SIZES),
        {"pooling_mode": "cls"},
        (),
        False,
        {"config_sentence_transformers": {"prompts": {"query": "Represent: "}}},
    ),
    "e5": (
        lambda: tf.XLMRobertaConfig(**{**SIZES, "pad_token_id": 1, "max_position_embeddings": 98}),
        {"pooling_mode_mean_tokens": True},
        (),
        True,
        {"config_sentence_transformers": E5},
    ),
    "mpnet": (
        lambda: tf.MPNetConfig(**{**SIZES, "pad_token_id": 1, "max_position_embeddings": 98}),
        {"pooling_mode_max_tokens": True, "pooling_mode_mean_sqrt_len_tokens": True},
        (),
        False,
        {"config_sentence_transformers": {"similarity_fn_name": "dot"}},
    ),
    "gte-modernbert": (
        lambda: tf.ModernBertConfig(**SIZES, local_attention=8),
        {"pooling_mode": "cls"},
        (),
        False,
        {},
    ),
    "nomic": (
        lambda: tf.NomicBertConfig(**SIZES),
        {"pooling_mode": "mean"},
        (),
        True,
        {"config_sentence_transformers": {"prompts": {"query": "search_query: "}}},
    ),
    "qwen3-embedding": (
        lambda: tf.Qwen3Config(**SIZES, **HEADS),
        {"pooling_mode_lasttoken": True, "include_prompt": True},
        (),
        True,
        {"config_sentence_transformers": QWEN},
    ),
    "embeddinggemma": (
        lambda: tf.Gemma3TextConfig(**SIZES, **HEADS, **GEMMA, use_bidirectional_attention=True),
        {"pooling_mode_mean_tokens": True},
        ((WIDTH, 64), (64, WIDTH)),
        True,
        {"config_sentence_transformers": TASKS},
    ),
    "sgpt": (
        lambda: tf.GPTNeoXConfig(**SIZES),
        {"pooling_mode_weightedmean_tokens": True},
        (),
        False,
        {},
    ),
    "instructor": (
        lambda: tf.BertConfig(**SIZES),
        {"pooling_mode_mean_tokens": True, "include_prompt": False},
        ((WIDTH, 16),),
        True,
        {"config_sentence_transformers": {"prompts": {"query": "Represent the question: "}}},
    ),
}


def framed(padding_side: str = "right") -> Any:
    """A tokenizer with a special token before and after each text."""
    tokenizer = tokenizers.byte_level(chat_template=None)
    start, end = "<|im_start|>", "<|im_end|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}",
        pair=f"{start} $A {end} $B {end}",
        special_tokens=[(start, tokenizers.IM_START), (end, tokenizers.IM_END)],
    )
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    tokenizer.padding_side = padding_side
    tokenizer.model_max_length = 96
    return tokenizer


def save(name: str, folder: Path) -> Path:
    """The folder of the encoder ``name``."""
    config, pooling, dense, normalizes, files = FAMILIES[name]
    torch.manual_seed(len(name))
    model = tf.AutoModel.from_config(config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.3 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    framed("left" if "last" in str(pooling) else "right").save_pretrained(folder)
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": WIDTH, **pooling})
    for place, (inner, outer) in enumerate(dense, 2):
        modules.append(("Dense", f"{place}_Dense"))
        _save_dense(folder / f"{place}_Dense", inner, outer)
    if normalizes:
        modules.append(("Normalize", f"{len(modules)}_Normalize"))
    entries = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(modules)
    ]
    _write(folder / "modules.json", entries)
    for file, content in files.items():
        _write(folder / f"{file}.json", content)
    return folder


def _save_dense(folder: Path, inner: int, outer: int) -> None:
    activation = "Identity" if outer > inner else "Tanh"
    config = {"in_features": inner, "out_features": outer, "bias": outer < inner}
    _write(
        folder / "config.json",
        {**config, "activation_function": f"torch.nn.modules.linear.{activation}"}
        if activation == "Identity"
        else {**config, "activation_function": "torch.nn.modules.activation.Tanh"},
    )
    weights = {"linear.weight": torch.randn(outer, inner) / inner**0.5}
    if config["bias"]:
        weights["linear.bias"] = torch.randn(outer) / 4
    save_file(weights, folder / "model.safetensors")


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
