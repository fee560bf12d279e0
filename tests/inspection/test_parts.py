"""Where layers, final norm, head and routers of a model are: found without knowing its kind."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import transformers as tf

from tests.engine.models import BATCHED, IDS, SIZES
from tests.inspection.models import ALL, tiny
from transformers_api.engine.places import model_places
from transformers_api.engine.runners.packed_linear import pack_linears
from transformers_api.engine.watched_pass import holding_passes
from transformers_api.families.decoder import DecoderForCausalLM
from transformers_api.families.gpt3dev import GPT3DevConfig, GPT3DevForCausalLM
from transformers_api.families.niels import NielsConfig, NielsForCausalLM
from transformers_api.families.tinygpt import TinyGPTConfig, TinyGPTForCausalLM
from transformers_api.families.tinygpt2 import TinyGPT2Config, TinyGPT2ForCausalLM
from transformers_api.inspection.parts import Parts, find_parts, lens_logits, residuals_of

SMALL = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
OURS: dict[str, tuple[type[DecoderForCausalLM], object]] = {
    "tinygpt": (TinyGPTForCausalLM, TinyGPTConfig(**SMALL)),
    "tinygpt-moe": (TinyGPTForCausalLM, TinyGPTConfig(**SMALL, num_experts=4)),
    "tinygpt2": (TinyGPT2ForCausalLM, TinyGPT2Config(**SIZES)),
    "niels-1": (NielsForCausalLM, NielsConfig(**SMALL, version=1)),
    "niels-2": (NielsForCausalLM, NielsConfig(**SMALL, version=2)),
    "gpt3dev": (GPT3DevForCausalLM, GPT3DevConfig(**SMALL, sliding_window=8)),
}
NORMS = {
    "llama": "model.norm",
    "gpt2": "transformer.ln_f",
    "gpt-neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
    "mamba": "backbone.norm_f",
    "recurrent-gemma": "model.final_norm",
    "conv-hybrid": "model.embedding_norm",
    "rwkv": "rwkv.ln_out",
    "gpt-1-without-cache": None,  # its last layer ends with one of its own
    "tinygpt-moe": "model.ln_f",
}


def model_of(name):
    if name not in OURS:
        return copy.deepcopy(tiny(name))
    kind, config = OURS[name]
    torch.manual_seed(0)
    return kind(copy.deepcopy(config)).eval()


@pytest.mark.parametrize(
    ("name", "packed"),
    [(name, False) for name in [*ALL, *OURS]] + [(name, True) for name in [*BATCHED, *OURS]],
)
@torch.inference_mode()
def test_the_lens_on_the_last_layer_gives_the_models_own_logits_to_the_bit(name, packed):
    model = model_of(name)
    if packed:
        pack_linears(model)
    parts = find_parts(model)
    assert len(parts.layers) == model.config.num_hidden_layers
    assert model.get_submodule(parts.head) is model.get_output_embeddings()
    assert parts.lens
    assert parts.lens_is_exact
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    seen = []
    with residuals_of(
        model, parts, [len(parts.layers) - 1], lambda _, each: seen.append(each.clone())
    ):
        wanted = model(input_ids=ids, use_cache=False).logits[0]
    assert torch.equal(lens_logits(model, parts, seen[0][0]), wanted.float())
    again = model(input_ids=ids, use_cache=False).logits[0]
    assert torch.equal(again, wanted)  # the lens has left nothing behind


@pytest.mark.parametrize("name", NORMS)
@torch.inference_mode()
def test_the_final_norm_is_found(name):
    assert find_parts(model_of(name)).final_norm == NORMS[name]


@pytest.mark.parametrize("name", ["llama", "mamba", "gpt2"])
@torch.inference_mode()
def test_looking_for_parts_leaves_no_hooks(name):
    model = model_of(name)
    before = hooks_on(model)
    find_parts(model)
    assert hooks_on(model) == before


@pytest.mark.parametrize(
    ("name", "layers", "experts"),
    [
        ("mixtral", (0, 1, 2), 4),
        ("gpt-oss-sinks", (0, 1, 2), 4),
        ("deepseek-mla", (1, 2), 4),
        ("qwen3-next", (0, 1, 2, 3), 4),
        ("tinygpt-moe", (0, 1, 2), 4),
    ],
)
@torch.inference_mode()
def test_routers_are_found(name, layers, experts):
    parts = find_parts(model_of(name))
    assert tuple(layer for layer, _ in parts.routers) == layers
    assert parts.routing.layers == layers
    assert parts.routing.experts == experts


@torch.inference_mode()
def test_a_model_without_experts_has_no_routing():
    assert find_parts(model_of("llama")).routing is None


@torch.inference_mode()
def test_a_model_whose_residuals_are_not_one_stream_is_not_given_a_lens():
    config = tf.Gemma3nTextConfig(
        **SIZES,
        **IDS,
        head_dim=8,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
        activation_sparsity_pattern=None,
        laurel_rank=4,
    )
    parts = find_parts(tf.AutoModelForCausalLM.from_config(config).eval())
    assert not parts.layers
    assert not parts.lens


@torch.inference_mode()
def test_a_lens_that_reads_something_else_is_not_offered():
    config = tf.OPTConfig(  # a norm and then a projection: no one module leads to the head
        vocab_size=97,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=16,
        **IDS,
    )
    parts = find_parts(tf.AutoModelForCausalLM.from_config(config).eval())
    assert len(parts.layers) == 2
    assert not parts.lens
    assert not parts.lens_is_exact


def test_what_cannot_be_run_has_no_parts():
    assert find_parts(torch.nn.Linear(2, 2)) == Parts()


@torch.inference_mode()
def test_parts_keep_no_model_alive():
    model = model_of("llama")
    parts, alive = find_parts(model), weakref.ref(model)
    del model
    gc.collect()
    assert parts.lens
    assert alive() is None


def hooks_on(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def test_a_model_that_was_watched_for_its_places_is_not_watched_again_for_its_parts():
    model, calls = model_of("llama"), []
    model.get_submodule("model.norm").register_forward_hook(lambda *_: calls.append(1))
    with holding_passes():
        model_places(model)
        held = find_parts(model)
    in_a_load = len(calls)
    assert held == find_parts(model)
    assert model_places(model)
    assert len(calls) - in_a_load == in_a_load + 1
