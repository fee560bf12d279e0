from __future__ import annotations

import copy
import gc
import json
import re
import weakref

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

from tests.engine.models import BATCHED, tiny_model
from tests.engine.reading import GREEDY, ask, complete
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.pretrained import gpu_dtype, load_model, pick_device
from transformers_api.engine.runners import model_runner
from transformers_api.engine.runners.packed_linear import PackedLinear, can_pack, pack_linears
from transformers_api.engine.stored_model import load_stored, stored_weights
from transformers_api.errors import ModelLoadFailed, ModelNotServable


@pytest.fixture
def folder(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True, params=["streamed", "whole"])
def way(request, monkeypatch):
    """Models are loaded tensor by tensor, or by transformers: errors are the same."""
    monkeypatch.setattr("tests.engine.test_loader.WAY", request.param)


WAY = "streamed"


def load(folder, **options):
    dtype = options.get("dtype", "auto")
    if WAY == "whole":
        return load_model(folder, "cpu", dtype, trust_remote_code=False)
    try:
        weights = stored_weights(folder, trust_remote_code=False)
    except OSError as error:
        raise ModelLoadFailed(str(error)) from error
    served = weights.serving_dtype(dtype, "cpu")
    return load_stored(folder, weights, served, lambda model, own, dtype: own.fill(model, dtype))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_folder_is_loaded_and_served(folder, engine_thread):
    engine = engine_thread.call(
        lambda: load_engine(folder, LoadOptions(num_slots=2), engine_thread)
    ).result()
    assert len(complete(engine, ask([3, 4, 5], max_tokens=5, **GREEDY))[0]) == 5
    engine.close()


def test_a_missing_weight_is_a_failed_load_that_names_it(folder):
    edit_weights(folder, lambda weights: weights.pop("transformer.h.1.attn.c_attn.weight"))
    with pytest.raises(ModelLoadFailed, match=r"missing keys.*h\.1\.attn\.c_attn\.weight"):
        load(folder)


def test_an_unexpected_weight_is_a_failed_load_that_names_it(folder):
    edit_weights(folder, lambda w: w.update({"transformer.h.9.extra": torch.zeros(2)}))
    with pytest.raises(ModelLoadFailed, match=r"unexpected keys.*h\.9\.extra"):
        load(folder)


def test_more_layers_in_the_config_than_in_the_file_is_a_failed_load(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 5}))
    with pytest.raises(ModelLoadFailed, match="missing keys"):
        load(folder)


def test_another_width_in_the_config_is_a_failed_load(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_inner": 64}))
    with pytest.raises(ModelLoadFailed):
        load(folder)


def test_a_pickle_is_not_opened(folder):
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model("gpt2").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadFailed):
        load(folder)


def test_an_encoder_decoder_is_refused_by_name(tmp_path):
    config = tf.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    tf.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelNotServable, match=r"[Ee]ncoder-decoder"):
        load(tmp_path)


def test_a_cpu_serves_in_float32_unless_told_otherwise(tmp_path):
    copy.deepcopy(tiny_model("llama")).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).dtype == torch.float32
    assert load(tmp_path, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("stored", "size", "has_bfloat16", "served"),
    [
        ("float32", 500_000_000, True, "bfloat16"),
        ("float32", 500_000_000, False, "float16"),
        ("float32", 1_000_000, True, "float32"),
        ("float16", 500_000_000, True, "float16"),
    ],
)
def test_a_gpu_serves_sixteen_bits_unless_the_checkpoint_is_small(
    monkeypatch, stored, size, has_bfloat16, served
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bfloat16)
    assert gpu_dtype(stored, size) == served


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused():
    assert pick_device("auto") in ("cpu", "mps")
    with pytest.raises(ModelLoadFailed, match="cuda") as caught:
        pick_device("cuda")
    assert caught.value.param == "device"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    assert pick_device("cuda:0") == "cuda:0"
    with pytest.raises(ModelLoadFailed, match="GPUs"):
        pick_device("cuda:99")


def test_closing_lets_go_of_the_model(folder, engine_thread):
    engine = engine_thread.call(
        lambda: load_engine(folder, LoadOptions(num_slots=2), engine_thread)
    ).result()
    complete(engine, ask([3, 4, 5], max_tokens=5))
    model = weakref.ref(engine.model)
    engine.close()
    gc.collect()
    assert model() is None


def test_a_model_that_disagrees_with_itself_in_a_batch_is_served_alone(make_engine, monkeypatch):
    monkeypatch.setattr(
        model_runner.MaskBuilder, "build", lambda self, positions, seen: None, raising=True
    )
    engine = make_engine("llama")
    assert engine.describe().mode == "sequential"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_layers_give_the_same_numbers(dtype):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(BATCHED["llama"](), dtype=dtype).eval()
    ids = torch.arange(3, 30)[None]
    with torch.inference_mode():
        plain = model(ids).logits.float()
        pack_linears(model)
        packed = model(ids).logits.float()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (plain - packed).abs().max() <= tolerance * plain.abs().max()
    kinds = {type(module) for module in model.modules()}
    assert (PackedLinear in kinds) == can_pack(dtype)
    assert (nn.Linear in kinds) != can_pack(dtype)


def test_packing_keeps_tied_embeddings_readable():
    torch.manual_seed(0)
    config = BATCHED["llama"]()
    config.tie_word_embeddings = True
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    pack_linears(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].mlp.up_proj.weight.shape == (64, 32)


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "torch.float32"},
        {"torch_dtype": "torch.float16"},
        {"dtype": "bf16"},
        {"dtype": "auto"},
        {"dtype": "nonsense"},
        {"dtype": 16},
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "flash_attention_3"},
        {"attn_implementation": "kernels-community/flash-attn"},
        {"use_return_dict": False, "return_dict": False},
        {"output_attentions": True, "output_hidden_states": True, "torchscript": True},
        {"experts_implementation": "grouped_mm"},
        {"quantization_config": {}},
        {"quantization_config": None},
    ],
)
def test_settings_that_do_not_matter_here_are_accepted(folder, settings):
    right = load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    model = load(folder)
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, right(ids).logits)
    assert model.config._attn_implementation == right.config._attn_implementation


def test_a_weight_of_another_shape_is_named_with_its_file_and_both_shapes(folder):
    name = "transformer.h.0.mlp.c_fc.weight"
    edit_weights(folder, lambda weights: weights.update({name: torch.zeros(3, 5)}))
    place = rf"{re.escape(name)} \(model\.safetensors\) has the shape \[3, 5\]"
    with pytest.raises(ModelLoadFailed, match=place + r", the configuration says \[\d+, \d+\]"):
        load(folder)


def old_masks(kind, name):
    square = torch.ones(1, 1, 64, 64).tril().bool()
    parts = {"gpt2": "attn", "gpt_neo": "attn.attention", "gptj": "attn", "codegen": "attn"}
    if kind == "codegen":
        return {f"{name}.{parts[kind]}.causal_mask": square}
    return {
        f"{name}.{parts[kind]}.bias": square,
        f"{name}.{parts[kind]}.masked_bias": torch.tensor(-1e9),
    }


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("gpt2", tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        (
            "gpt_neo",
            tf.GPTNeoConfig(
                hidden_size=32,
                num_layers=2,
                num_heads=4,
                attention_types=[[["global", "local"], 1]],
                max_position_embeddings=64,
            ),
        ),
        ("gptj", tf.GPTJConfig(n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=8)),
        ("codegen", tf.CodeGenConfig(n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=8)),
    ],
)
def test_masks_that_older_versions_saved_are_passed_over(tmp_path, kind, config):
    config.vocab_size, config.eos_token_id, config.bos_token_id = 64, 1, 1
    original = tf.AutoModelForCausalLM.from_config(config).eval()
    original.save_pretrained(tmp_path)
    for layer in range(2):
        edit_weights(tmp_path, lambda w, n=layer: w.update(old_masks(kind, f"transformer.h.{n}")))
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(ids).logits, original(ids).logits)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("transformer.h.0.attn.causal_mask", [32]),
        ("transformer.h.0.attn.causal_mask", [1, 1, 64, 32]),
        ("transformer.h.0.attn.causal_mask", [1, 2, 64, 64]),
        ("transformer.h.0.attn.masked_bias", [4]),
        ("transformer.h.0.mlp.causal_mask", [1, 1, 64, 64]),
    ],
)
def test_what_only_looks_like_an_old_mask_is_unexpected(folder, name, shape):
    edit_weights(folder, lambda weights: weights.update({name: torch.zeros(shape)}))
    with pytest.raises(ModelLoadFailed, match=f"unexpected keys: {re.escape(name)}"):
        load(folder)
