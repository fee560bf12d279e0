"""Whole models on packed weights."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.engine.models import BATCHED, tiny_model
from transformers_api.kernels.modules.linear import NativeEmbedding, NativeLinear
from transformers_api.kernels.modules.replace import Widths, layer_groups, pack_model

IDS = torch.tensor([[5, 9, 33, 71, 8, 2, 90]])


def pair(library, name, kind="float32"):
    plain = copy.deepcopy(tiny_model(name))
    native = copy.deepcopy(plain)
    with torch.no_grad():
        groups = layer_groups(native, lambda: native(input_ids=IDS[:, :2], use_cache=False))
    pack_model(native, library, Widths(kind), groups)
    return plain, native


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("name", BATCHED)
def test_every_family_gives_its_own_logits(library, name):
    plain, native = pair(library, name)
    assert any(isinstance(module, NativeLinear) for module in native.modules())
    assert torch.allclose(logits(native), logits(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "tolerance"), [("bfloat16", 0.03), ("int8", 0.06)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
def test_narrow_weights_stay_near(library, name, kind, tolerance):
    plain, native = pair(library, name, kind)
    wanted = logits(plain)
    given = logits(native)
    assert given.dtype == torch.float32
    assert (given - wanted).norm() < tolerance * wanted.norm()


def test_layers_with_one_input_are_one_call(library):
    _, native = pair(library, "llama")
    layer = native.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    assert attention.q_proj.joined is attention.k_proj.joined is attention.v_proj.joined
    assert mlp.gate_proj.joined is mlp.up_proj.joined
    assert len(mlp.down_proj.joined.sizes) == len(attention.o_proj.joined.sizes) == 1


def test_an_embedding_tied_to_the_output_shares_its_packed_weights(library):
    _, native = pair(library, "gpt2")
    embedding, head = native.transformer.wte, native.lm_head
    assert isinstance(embedding, NativeEmbedding)
    assert embedding.packed is head.joined.weight


def test_no_old_weight_is_kept_and_the_model_still_says_where_it_is(library):
    _, native = pair(library, "llama", "bfloat16")
    assert native.device.type == "cpu"
    assert native.dtype == torch.float32
    assert native.get_output_embeddings().weight.shape == (97, 32)
    names = [name for name, _ in native.named_parameters()]
    assert all("norm" in name or "embed" in name for name in names), names


def test_a_gradient_reaches_the_embeddings(library):
    plain, native = pair(library, "llama")
    gradients = []
    for model in (plain, native):
        vectors = plain.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=vectors, use_cache=False).logits[0, -1, 7].backward()
        gradients.append(vectors.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)
