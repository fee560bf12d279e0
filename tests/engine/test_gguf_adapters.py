"""LoRA adapters in GGUF files: what the folder gives that they were made from."""

from __future__ import annotations

import gguf
import numpy
import pytest
import torch

from tests import lora
from tests.engine.models import tiny_model
from tests.engine.reading import ask, complete, tokens
from tests.engine.test_adapters import PROMPT, kernels, scores  # noqa: F401
from transformers_api.errors import InsufficientMemory, ModelLoadFailed
from transformers_api.serving.models.adapter_files import check_base, inspect_adapter

# name of a tiny model -> ggml's name of the architecture, the layers that are adapted
MODELS = {
    "llama": ("llama", [*lora.ALL, "lm_head"]),
    "qwen3": ("qwen3", lora.ALL),
    "gemma2": ("gemma2", ["q_proj", "down_proj"]),
    "gpt-oss-sinks": ("gpt-oss", ["q_proj", "o_proj"]),
}


def in_pairs(rows, heads):
    """Rows as llama.cpp's converter puts those that are rotated together."""
    shape = rows.shape
    return rows.reshape(heads, 2, -1, shape[1]).swapaxes(1, 2).reshape(shape)


def write(path, architecture, model, parts, kind=numpy.float32, **keys):
    """A file as llama.cpp's convert_lora_to_gguf.py writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.type", keys.pop("general_type", "adapter"))
    writer.add_string("adapter.type", keys.pop("adapter_type", "lora"))
    if (alpha := keys.pop("alpha", 8.0)) is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, 99)
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for layer, (down, up) in parts.items():
        name = names.get_name(layer) or layer
        down, up = (numpy.asarray(each) for each in (down, up))
        leaf = layer.rpartition(".")[2]
        if architecture == "llama" and leaf in heads:
            up = in_pairs(up, heads[leaf])
        writer.add_tensor(f"{name}.weight.lora_a", down.astype(kind))
        writer.add_tensor(f"{name}.weight.lora_b", up.astype(kind))
    for key, value in keys.items():
        writer.add_array(key.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def parts_of(model, layers, rank=4):
    return lora.matrices(model, lora.matching(model, layers), rank, seed=3)


@pytest.mark.parametrize("name", MODELS)
def test_a_file_gives_what_its_folder_gives(make_engine, tmp_path, kernels, name):  # noqa: F811
    architecture, layers = MODELS[name]
    model = tiny_model(name)
    engine, parts = make_engine(name, native=kernels), parts_of(model, layers)
    folder = lora.save(tmp_path / "folder", parts, lora_alpha=8)
    file = write(tmp_path / "own.gguf", architecture, model, parts)
    one, other = (engine.adapted(lora.source(each)) for each in (folder, file))
    assert torch.equal(scores(one), scores(other))
    assert not torch.allclose(scores(one), scores(engine), atol=1e-2)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 1.0), (-3.0, -0.75), (6.0, 1.5)])
def test_the_scale_is_alpha_over_the_rank_or_one(tmp_path, alpha, scale):
    model = tiny_model("llama")
    file = write(tmp_path / "a.gguf", "llama", model, parts_of(model, ["v_proj"]), alpha=alpha)
    assert {layer.scale for layer in lora.source(file).layers} == {scale}


def test_numbers_of_sixteen_bits_are_read(make_engine, tmp_path):
    model, engine = tiny_model("llama"), make_engine("llama")
    parts = {
        path: (down.half().float(), up.half().float())
        for path, (down, up) in parts_of(model, ["q_proj", "up_proj"]).items()
    }
    one = lora.source(write(tmp_path / "a.gguf", "llama", model, parts))
    other = lora.source(write(tmp_path / "b.gguf", "llama", model, parts, numpy.float16))
    assert torch.equal(scores(engine.adapted(one)), scores(engine.adapted(other)))


def test_base_and_both_kinds_of_adapters_share_a_batch(make_engine, tmp_path):
    model, engine = tiny_model("llama"), make_engine("llama")
    parts = parts_of(model, lora.ATTENTION)
    folder = lora.save(tmp_path / "folder", parts, lora_alpha=8)
    file = write(tmp_path / "own.gguf", "llama", model, parts)
    each = [engine, *(engine.adapted(lora.source(path)) for path in (folder, file))]
    request = ask(PROMPT, max_tokens=8, temperature=0.0, ignore_eos=True)
    streams = [one.submit([request]) for one in each]
    said = [tokens(stream)[0] for stream in streams]
    assert said == [complete(one, request)[0] for one in each]
    assert said[1] == said[2] != said[0]


LAYER = "model.layers.0.mlp.up_proj"
ONES = numpy.ones((4, 32), numpy.float32), numpy.ones((64, 4), numpy.float32)
NAN = (ONES[0] * numpy.nan, ONES[1])


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ({LAYER: ONES}, {"general_type": "model"}, "general.type is 'model', and no adapter"),
        ({LAYER: ONES}, {"adapter_type": "control"}, "adapter.type is 'control', only lora"),
        ({LAYER: ONES}, {"alpha": float("nan")}, "adapter.lora.alpha is nan"),
        ({LAYER: ONES}, {"alpha": float("inf")}, "adapter.lora.alpha is inf"),
        (
            {LAYER: ONES},
            {"adapter__alora__invocation_tokens": [1, 2]},
            "adapter.alora.invocation_tokens: it is active",
        ),
        ({LAYER: NAN}, {}, "ffn_up.weight.lora_a has numbers that are not finite"),
        ({LAYER: (ONES[0][:3], ONES[1])}, {}, "has rank 3 in lora_a and 4 in lora_b"),
        ({LAYER: (ONES[0][0], ONES[1])}, {}, r"the shape \[32\], which is no matrix's"),
        ({"model.embed_tokens": ONES}, {}, "adapters of embeddings and experts"),
        ({"blk.0.ffn_up_exps": ONES}, {}, "adapters of embeddings and experts"),
        ({}, {}, "holds no tensors"),
    ],
)
def test_what_cannot_be_applied_is_refused_by_its_key(tmp_path, parts, options, message):
    file = write(tmp_path / "own.gguf", "llama", tiny_model("llama"), parts, **options)
    with pytest.raises(ModelLoadFailed, match=message):
        inspect_adapter(file, "own")


def test_another_architecture_or_a_damaged_file_is_refused(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(ModelLoadFailed, match="'granite', whose adapters cannot be read"):
        inspect_adapter(write(tmp_path / "a.gguf", "granite", model, {LAYER: ONES}), "a")
    file = write(tmp_path / "b.gguf", "llama", model, {LAYER: ONES})
    for size in (0, 20, 200, file.stat().st_size - 1):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ModelLoadFailed, match=r"cut\.gguf is not a sound GGUF file"):
            inspect_adapter(cut, "cut")
    with pytest.raises(ModelLoadFailed, match="is no file"):
        inspect_adapter(tmp_path / "absent.gguf", "absent")
    with pytest.raises(InsufficientMemory, match="MAX_ADAPTERS_MB"):
        inspect_adapter(file, "large", most_bytes=100)


def test_a_file_for_another_base_is_refused_by_the_shapes_of_its_tensors(tmp_path):
    model = tiny_model("llama")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    made = parts_of(model, ["up_proj", "lm_head"])
    check_base(*inspect_adapter(write(tmp_path / "a.gguf", "llama", model, made), "a"), shapes)
    other = {LAYER: (ONES[0], ONES[1][:60])}
    with pytest.raises(ModelLoadFailed, match=r"blk\.0\.ffn_up there is of 64 x 32"):
        check_base(*inspect_adapter(write(tmp_path / "b.gguf", "llama", model, other), "b"), shapes)
    deeper = {"model.layers.9.mlp.up_proj": ONES}
    with pytest.raises(ModelLoadFailed, match=r"has no layer blk\.9\.ffn_up|no layer such as"):
        check_base(
            *inspect_adapter(write(tmp_path / "c.gguf", "llama", model, deeper), "c"), shapes
        )
