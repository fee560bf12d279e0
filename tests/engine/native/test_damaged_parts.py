"""Parts of quantised weights that cannot be: the headers' check refuses all that a load would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.quantized_models import FORMATS, FP8, float8_blocks, mxfp4
from tests.repeats import slow
from transformers_api.checkpoints.headers.safetensors_file import read_header
from transformers_api.engine.safetensors_weights import SafetensorsWeights
from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.quantized_files import quantized_types

LAYER = "model.layers.0.mlp.up_proj"
OF_EXPERTS = ("mxfp4", "fp8-experts")
STACK = "model.layers.0.mlp.experts.gate_up_proj"
FEW = ("gptq-act-order", "awq", "w4a16-asym", "w8a8", "nf4-nested", "bnb-int8", *OF_EXPERTS)
DTYPES = (torch.float16, torch.float32, torch.int32, torch.int64, torch.int8, torch.uint8)
NUMBERS = (0, 1, -1, 2**31 - 1)  # of parts that hold places or sizes
STATE = ".quant_state.bitsandbytes__"


def stack(weight):
    return mxfp4(weight.view(2, -1, 64))[0]


def float8_stack(weight):
    made = [float8_blocks(each)[0] for each in weight.view(2, -1, 64)]
    names = {"weight": "", "weight_scale_inv": "_scale_inv"}
    return {f"experts{names[name]}": torch.stack([each[name] for each in made]) for name in made[0]}


def parts_of(name):
    """The tensors of one weight (128, 64) in a format, and the configuration."""
    torch.manual_seed(0)
    weight = torch.randn(128, 64)
    if name == "mxfp4":
        return {f"{STACK}_{n}": t for n, t in stack(weight).items()}, {"quant_method": "mxfp4"}
    if name == "fp8-experts":
        config = FP8 | {"weight_block_size": [32, 32]}
        return {f"model.layers.0.{n}": t for n, t in float8_stack(weight).items()}, config
    own = FORMATS[name]
    return {f"{LAYER}.{n}": t.contiguous() for n, t in own.write(weight)[0].items()}, own.config


def other_shapes(tensor):
    """The tensor with more and fewer of each of its sizes, and with other dimensions."""
    yield tensor[None].contiguous()
    yield tensor.reshape(-1)
    yield tensor.reshape(-1)[:1].reshape(())
    for dim, size in enumerate(tensor.shape):
        for other in {size + 1, size - 1, 2 * size, size // 2, 1, 0} - {size}:
            if other >= 0:
                index = torch.arange(other) % max(size, 1)
                yield tensor.index_select(dim, index)


def damaged(tensors):
    """(what is wrong, tensors) for each thing that may be wrong with each part."""
    for name, tensor in tensors.items():
        rest = {other: each for other, each in tensors.items() if other != name}
        yield f"{name} is missing", rest
        if STATE in name:
            state = json.loads(bytes(tensor.tolist()))
            for key, value in state.items():
                for other in (None, "64", 0, -1, 3, 1.5, [], [64], [128, 64, 1], [1 << 40, 64]):
                    text = json.dumps(state | {key: other}).encode()
                    new = torch.frombuffer(bytearray(text), dtype=torch.uint8)
                    yield f"{key} is {other} and not {value}", rest | {name: new}
            continue
        for made in other_shapes(tensor):
            yield f"{name} is {list(made.shape)}", rest | {name: made.contiguous()}
        for dtype in DTYPES:
            if dtype != tensor.dtype:
                yield f"{name} is {dtype}", rest | {name: tensor.to(dtype)}
        if name.endswith(("g_idx", "weight_shape")):
            for number in NUMBERS:
                changed = tensor.clone()
                changed[-1] = number
                yield f"{name} ends with {number}", rest | {name: changed}


def read_all(folder: Path):
    """Read every quantised weight as a load does: as numbers, and in blocks where it has some.

    Whatever is left over would fit no parameter.
    """
    weights = SafetensorsWeights(folder)
    assert weights._tensors.keys() == weights._quantized.keys()
    for tensor in weights._quantized.values():
        tensor.copied(torch.float32)
        for index in range(tensor.shape[0]) if len(tensor.shape) == 3 else [None]:
            matrix = tensor.matrix(index)
            if matrix.kind is not None:
                matrix.blocks(0, matrix.shape[0])
    weights.close()


@pytest.mark.parametrize("name", [*FEW, *slow(*(name for name in FORMATS if name not in FEW))])
def test_what_headers_pass_can_be_read(tmp_path, name):
    tensors, quantization = parts_of(name)
    config = {"model_type": "llama", "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    file, faults = tmp_path / "model.safetensors", []
    save_file(tensors, file, metadata={"format": "pt"})
    assert sum(quantized_types(config, {file: read_header(file)}).values()) == 128 * 64
    for what, changed in damaged(tensors):
        save_file(changed, file, metadata={"format": "pt"})
        try:
            quantized_types(config, {file: read_header(file)})
        except ModelLoadFailed:
            continue
        try:
            read_all(tmp_path)
        except Exception as error:
            faults.append(f"{what}: {error!r}")
    assert faults == []
