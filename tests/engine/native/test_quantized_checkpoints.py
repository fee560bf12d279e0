"""Checkpoints as GPTQ, AWQ, compressed-tensors, FP8 and bitsandbytes write them, without these."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from tests.engine.models import prompts_of
from tests.engine.native.test_stored_weights import PEAK, first_logprob, load, plain_logprob  # noqa: F401
from tests.quantized_models import FORMATS, SIZES, Format, mxfp4, save, write_quantized
from transformers_api.engine.runners.model_runner import innermost
from transformers_api.engine.safetensors_weights import SafetensorsWeights
from transformers_api.engine.standby import StandbyModels
from transformers_api.engine.stored_model import load_stored
from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.preflight import inspect_folder

PROMPT = prompts_of(6)[5]
WIDTHS = {5.0: "int4", 8.5: "int8", 16.0: "numbers"}


def weights_of(model):
    """Packed weights by the names of parameters: (numbers, width)."""
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "joined"):
            packed = module.joined.weight
            part = packed.dense().split(module.joined.sizes)[module.index]
            bits = 8 * packed.nbytes / (packed.out_features * packed.in_features)
            found[f"{path}.weight"] = part, WIDTHS[bits]
    return found


def loss(numbers, exact):
    return ((numbers - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_read_as_its_library_means_it(load, tmp_path, native_cache, name):  # noqa: F811
    own = FORMATS[name]
    model, layers = write_quantized(own, tmp_path)
    exact = dict(model.named_parameters())
    weights = SafetensorsWeights(tmp_path)
    plain = load_stored(tmp_path, weights, torch.float32, lambda m, own, kind: own.fill(m, kind))
    for path, parameter in plain.named_parameters():
        assert torch.equal(parameter, exact[path]), path
    assert weights.is_quantized

    engine = load(tmp_path, native=native_cache, quantization="stored")
    facts = engine.describe()
    assert (facts.kernels, facts.quantization) == ("native", own.config["quant_method"])
    packed = weights_of(innermost(engine.runner).model)
    assert {packed[layer][1] for layer in layers} == {own.width}
    for path, (numbers, width) in packed.items():
        if path in layers:
            assert loss(numbers, exact[path]) <= own.lost, path
        else:
            assert width == "numbers"
    expected = plain_logprob(model, PROMPT)
    assert first_logprob(engine, PROMPT) == pytest.approx(expected, abs=0.05)


def test_another_width_or_numbers_can_be_asked_for(load, tmp_path, native_cache):  # noqa: F811
    model, _ = write_quantized(FORMATS["gptq"], tmp_path)
    expected = plain_logprob(model, PROMPT)
    for quantization in ("int8", "none", "auto"):  # so small a model is numbers by itself
        engine = load(tmp_path, native=native_cache, quantization=quantization)
        served = "none" if quantization == "auto" else quantization
        assert engine.describe().quantization == served
        assert first_logprob(engine, PROMPT) == pytest.approx(expected, abs=0.05)
    engine = load(tmp_path, quantization="stored")
    assert engine.describe().quantization == "none"
    assert first_logprob(engine, PROMPT) == pytest.approx(expected, abs=1e-4)


def test_quantised_experts_become_one_layer_each_in_its_width(load, tmp_path, native_cache):  # noqa: F811
    config = tf.Qwen3MoeConfig(
        **SIZES,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
    )
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    own, tensors, made = FORMATS["fp8"], {}, []
    for layer, block in enumerate(model.model.layers):
        experts = block.mlp.experts
        for which in ("gate_up_proj", "down_proj"):
            made.append(f"model.layers.{layer}.mlp.experts.{which}")
            for number, matrix in enumerate(getattr(experts, which)):
                names = ("gate_proj", "up_proj") if which == "gate_up_proj" else ("down_proj",)
                parts = [own.write(part) for part in matrix.detach().chunk(len(names))]
                for name, (written, _) in zip(names, parts, strict=True):
                    stem = f"model.layers.{layer}.mlp.experts.{number}.{name}"
                    tensors |= {f"{stem}.{part}": each for part, each in written.items()}
                with torch.no_grad():
                    matrix.copy_(torch.cat([exact for _, exact in parts]))
    save(tmp_path, model, own, tensors, made)
    expected = plain_logprob(model, PROMPT)
    assert first_logprob(load(tmp_path), PROMPT) == pytest.approx(expected, abs=1e-4)
    engine = load(tmp_path, native=native_cache, quantization="stored")
    assert first_logprob(engine, PROMPT) == pytest.approx(expected, abs=0.05)
    packed = innermost(engine.runner).model.model.layers[0].mlp.experts.packed_up
    exact = model.model.layers[0].mlp.experts.gate_up_proj
    for number, weight in enumerate(packed.weights):
        assert weight.nbytes == exact[number].numel() * 34 // 32
        assert loss(weight.dense(), exact[number]) < 0.01


def test_experts_of_mxfp4_keep_their_very_numbers(load, tmp_path, native_cache):  # noqa: F811
    config = tf.GptOssConfig(
        **SIZES | {"max_position_embeddings": 4096, "intermediate_size": 96},
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    own = Format({"quant_method": "mxfp4"}, mxfp4, "int8", dtype=torch.bfloat16)
    tensors, made = {}, []
    for path, parameter in model.named_parameters():
        if path.endswith(("experts.gate_up_proj", "experts.down_proj")):
            torch.nn.init.normal_(parameter, std=0.02)
            written, exact = mxfp4(parameter.detach().transpose(1, 2))
            tensors |= {f"{path}_{name}": each for name, each in written.items()}
            made.append(path)
            with torch.no_grad():
                parameter.copy_(exact.transpose(1, 2))
    save(tmp_path, model, own, tensors, made)
    expected = plain_logprob(model, PROMPT)
    assert first_logprob(load(tmp_path), PROMPT) == pytest.approx(expected, abs=1e-4)
    engine = load(tmp_path, native=native_cache, quantization="stored")
    assert engine.describe().quantization == "mxfp4"
    assert first_logprob(engine, PROMPT) == pytest.approx(expected, abs=0.05)
    experts = innermost(engine.runner).model.model.layers[1].mlp.experts
    own = model.model.layers[1].mlp.experts
    for number in range(4):
        assert torch.equal(experts.packed_up.weights[number].dense(), own.gate_up_proj[number].t())
        assert torch.equal(experts.packed_down.weights[number].dense(), own.down_proj[number].t())


def test_scales_that_half_precision_cannot_say_are_quantised_anew(load, tmp_path, native_cache):  # noqa: F811
    own = FORMATS["w8a8"]

    def tiny(weight):
        written, exact = own.write(weight)
        small = torch.tensor(2.0**-10)
        return written | {"weight_scale": written["weight_scale"].float() * small}, exact * small

    model, layers = write_quantized(Format(own.config, tiny, "int8"), tmp_path)
    engine = load(tmp_path, native=native_cache, quantization="stored")
    packed = weights_of(innermost(engine.runner).model)
    exact = dict(model.named_parameters())
    assert all(packed[layer][1] == "int8" for layer in layers)
    assert 0 < max(loss(packed[layer][0], exact[layer]) for layer in layers) < 0.02


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("gptq", "model.layers.0.mlp.up_proj.scales", r"up_proj\.scales is missing"),
        ("awq", "model.layers.1.self_attn.q_proj.qzeros", r"q_proj\.qzeros is missing"),
        ("w4a16", "model.layers.0.mlp.up_proj.weight_shape", r"up_proj\.weight_shape is missing"),
        ("nf4", "model.layers.0.mlp.up_proj.weight.absmax", r"up_proj\.weight\.absmax is missing"),
        ("fp8", "model.layers.0.mlp.up_proj.weight", r"weight_scale_inv belongs to no weight"),
        ("fp8", "model.layers.0.mlp.up_proj.weight_scale_inv", r"up_proj\.weight is F8_E4M3"),
        ("w8a8", "model.layers.0.mlp.up_proj.weight_scale", r"up_proj\.weight is I8"),
        ("bnb-int8", "model.layers.0.mlp.up_proj.SCB", r"up_proj\.weight is I8"),
    ],
)
def test_a_part_of_a_weight_that_is_missing_is_named(load, tmp_path, name, missing, message):  # noqa: F811
    write_quantized(FORMATS[name], tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[missing]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadFailed, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "part", "shape", "message"),
    [
        ("gptq", "qweight", (), "no matrix's"),
        ("gptq", "qzeros", (8,), "no matrix's"),
        ("gptq", "scales", (2, 0), "holds nothing"),
        ("awq", "qweight", (), "no matrix's"),
        ("awq", "scales", (0, 128), "holds nothing"),
        ("w4a16", "weight_scale", (128, 0), "holds nothing"),
        ("w8a8", "weight", (), "no matrix's"),
        ("fp8-tensor", "weight_scale", (0,), "holds nothing"),
        ("fp8", "weight", (64,), "no matrix's"),
        ("fp8", "weight", (0, 64), "holds nothing"),
    ],
)
def test_a_part_of_a_shape_that_cannot_be_is_named_before_a_load(
    tmp_path, name, part, shape, message
):
    write_quantized(FORMATS[name], tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    weights = load_file(tmp_path / "model.safetensors")
    changed = f"model.layers.0.mlp.up_proj.{part}"
    weights[changed] = torch.zeros(shape).to(weights[changed].dtype)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadFailed, match=rf"{changed} has the shape .*{message}"):
        inspect_folder(tmp_path)


def test_targets_of_a_scheme_take_no_long_time_to_match(tmp_path):
    write_quantized(FORMATS["w4a16"], tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    config = json.loads((tmp_path / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_0"]["targets"] = ["re:(.*a|.*)*X", "re:" + ".?" * 99 + "X", "re:.*mlp", "Linear"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    began = time.thread_time()
    assert inspect_folder(tmp_path).stored_dtype == "compressed-tensors"
    assert time.thread_time() - began < 5


def test_weights_of_another_shape_than_the_configuration_says_are_refused(load, tmp_path):  # noqa: F811
    write_quantized(FORMATS["gptq"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(ModelLoadFailed, match=r"up_proj.weight has the shape \[128, 64\]"):
        load(tmp_path)


def test_a_quantised_model_sleeps_and_its_plans_are_used(load, tmp_path, native_cache):  # noqa: F811
    write_quantized(FORMATS["gptq"], tmp_path / "model")
    options = {"native": native_cache, "plans": tmp_path / "plans", "stamp": "one"}
    options |= {"standby": StandbyModels(1), "quantization": "stored"}
    first = load(tmp_path / "model", **options)
    before, model = first_logprob(first, PROMPT), innermost(first.runner).model
    first.close()
    again = load(tmp_path / "model", **options)
    assert innermost(again.runner).model is model
    assert first_logprob(again, PROMPT) == before
    anew = load(tmp_path / "model", **options | {"standby": StandbyModels(1)})
    assert innermost(anew.runner).model is not model
    assert first_logprob(anew, PROMPT) == before
    assert len(list((tmp_path / "plans").glob("*.plan"))) == 1


@pytest.mark.slow  # as the tests of the other forms
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["gptq", "nf4-nested", "bnb-int8"])
def test_a_load_takes_little_more_memory_than_the_packed_weights(tmp_path, native_cache, name):
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8}
    write_quantized(FORMATS[name], tmp_path, tf.LlamaConfig(**SIZES | wide))
    child = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(native_cache), "stored"],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert child.returncode == 0, child.stderr
    packed, taken = map(int, child.stdout.split())
    assert packed > 70 << 20
    assert taken < 1.1 * packed + (200 << 20)  # numbers would be 450 MB
