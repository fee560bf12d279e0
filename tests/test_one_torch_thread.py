"""One thread makes every torch call: over HTTP, from the load to the eviction."""

from __future__ import annotations

import json
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests import tokenizers
from transformers_api.api.http.services import EXTENSION
from transformers_api.app import create_app
from transformers_api.config.settings import Settings

TORCH = str(Path(torch.__file__).parent)
# These say something of what is there already, and compute nothing.
FACTS = {"_patched_getfile", "element_size", "__reduce_ex__", "__hash__", "__eq__"}


class Watch:
    """Notes which threads call torch, by a profile function in each."""

    def __init__(self) -> None:
        self.calls: dict[str, set[str]] = defaultdict(set)

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(TORCH):
            self.note(frame.f_code.co_qualname)
        elif event == "c_call" and _is_torch(arg):
            self.note(getattr(arg, "__qualname__", str(arg)))

    def note(self, name: str) -> None:
        if name.rpartition(".")[2] not in FACTS:
            self.calls[threading.current_thread().name].add(name)


def _is_torch(function: Any) -> bool:
    of = getattr(function, "__self__", None)
    kind = of if isinstance(of, type) else type(of)
    words = (getattr(function, "__module__", None), kind.__module__, kind.__name__)
    return any(
        str(word).partition(".")[0] in ("torch", "_VariableFunctionsClass") for word in words
    )


@contextmanager
def watching() -> Iterator[Watch]:
    """This thread, and all that are started meanwhile."""
    watch = Watch()
    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        yield watch
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tokenizers.byte_level()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    source = {"path": str(folder / "model")}
    entries = [
        {"name": "tiny", "embedding": {"pooling": "mean"}, **source},
        {"name": "two", **source},
    ]
    (folder / "models.json").write_text(json.dumps(entries))
    return folder


def post(client, route, **body):
    with client.post(route, json=body) as response:
        answer = response.get_data()
        assert response.status_code == 200, answer


MESSAGES = [{"role": "user", "content": "Hello"}]


def ask_everything(client):
    chat = {"messages": MESSAGES, "max_tokens": 4, "seed": 1}
    post(client, "/v1/chat/completions", model="tiny", **chat, logprobs=True, top_logprobs=2)
    post(client, "/v1/chat/completions", model="tiny", **chat, stream=True)
    post(client, "/v1/completions", model="tiny", prompt="abc", max_tokens=2, echo=True, logprobs=2)
    post(client, "/v1/embeddings", model="tiny", input=["abc", "def"])
    asked = {"model": "tiny", "prompt": "abc"}
    post(client, "/inspect/full_attn", **asked, trace_layer=0, head=0)
    for route in ("logit_lens", "attribution", "hidden_states"):
        post(client, f"/inspect/{route}", **asked)
    post(client, "/v1/chat/completions", model="two", **chat)


@pytest.mark.parametrize("native", [False, True])
def test_no_other_thread_calls_torch(registry, native, native_cache):
    settings = Settings(
        model_registry_path=registry / "models.json",
        include_default_models=False,
        default_model="tiny",
        preload_model=False,
        enable_embeddings_backend=True,
        model_store=registry / "store",
        hf_home=registry / "hub",
        torch_threads=1,
        rate_limit_per_min=0,
        native_kernels=native,
        native_cache=native_cache,
    )
    with watching() as watch:
        app = create_app(settings)
        ask_everything(app.test_client())
        app.extensions[EXTENSION].swapper.close()
    assert len(watch.calls.pop("engine")) > 50
    assert watch.calls == {}
