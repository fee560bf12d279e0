"""An application around a tiny random model, with the real engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flask import Flask

from transformers_api.api.http.services import EXTENSION
from transformers_api.app import create_app
from transformers_api.config.settings import Settings


def save(folder: Path, tokenizer: Any, **config: Any) -> None:
    """A small random Llama beside ``tokenizer``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(tokenizer) + 5,  # padded
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id,
    }
    LlamaForCausalLM(LlamaConfig(**sizes | config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def running(
    folder: Path, tokenizers: dict[str, Any], entries: Mapping[str, Mapping[str, Any]] = {}
) -> Iterator[Flask]:
    """The application with a model for each of ``tokenizers``; the first is the default.

    ``entries``: more fields of their registry entries, by name.
    """
    for name, tokenizer in tokenizers.items():
        save(folder / name, tokenizer)
    registered = [
        {"name": name, "path": str(folder / name), **entries.get(name, {})} for name in tokenizers
    ]
    (folder / "models.json").write_text(json.dumps(registered))
    app = create_app(
        Settings(
            model_registry_path=folder / "models.json",
            include_default_models=False,
            default_model=next(iter(tokenizers)),
            preload_model=False,
            model_store=folder / "store",
            hf_home=folder / "hub",
            torch_threads=1,
            rate_limit_per_min=0,
        )
    )
    try:
        yield app
    finally:
        app.extensions[EXTENSION].swapper.close()
