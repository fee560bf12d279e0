"""Weights as the libraries of quantised checkpoints write them, made by hand from their formats.

Each writer takes a matrix (out, in) and gives the tensors after a layer's name, and the very numbers
that they stand for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor

Written = tuple[dict[str, Tensor], Tensor]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 128,
}
LLAMA = tf.LlamaConfig(**SIZES)
LOWER = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911)
UPPER = (0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)
NF4 = torch.tensor([*LOWER, *UPPER])
BNB_FP4 = torch.tensor([0.0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12
MXFP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass(frozen=True)
class Format:
    """``config``: the quantization_config; ``write``: of each layer but the last."""

    config: dict[str, Any]
    write: Callable[[Tensor], Written]
    width: str  # of the packed weights
    lost: float = 0.0  # at most, of a weight's norm
    dtype: torch.dtype = torch.float16
    more: dict[str, Any] = field(default_factory=dict)


def packed(codes: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 words of codes, one after the other in ``dim``; the lowest bits have the first."""
    count = 32 // bits
    words = codes.to(torch.int64).unflatten(dim, (-1, count))
    made = torch.zeros_like(words.select(dim + 1, 0))
    for place in range(count):
        made |= words.select(dim + 1, (order or range(count))[place]) << (bits * place)
    return torch.where(made >= 1 << 31, made - (1 << 32), made).to(torch.int32)


def integers(
    weight: Tensor, bits: int, group: int, *, symmetric: bool, order: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes (out, in), scales and zero points (out, groups), and the numbers that they are.

    ``order`` (in): the group of each input.
    """
    out, width = weight.shape
    order = torch.arange(width) // group if order is None else order
    groups, top = int(order.max()) + 1, (1 << bits) - 1
    scales, zeros = torch.empty(out, groups), torch.empty(out, groups)
    for g in range(groups):
        own = weight[:, order == g]
        low, high = own.amin(1).clamp(max=0), own.amax(1).clamp(min=0)
        if symmetric:
            scales[:, g] = own.abs().amax(1) * 2 / top
            zeros[:, g] = (top + 1) // 2
        else:
            scales[:, g] = (high - low) / top
            zeros[:, g] = (-low / scales[:, g]).round().clamp(1, top)
    scales = scales.half().float()
    codes = (weight / scales[:, order] + zeros[:, order]).round().clamp(0, top)
    return codes.int(), scales, zeros.int(), (codes - zeros[:, order]) * scales[:, order]


def gptq(
    bits: int, group: int, *, symmetric: bool = True, version: int = 1, shuffled: bool = False
) -> Callable[[Tensor], Written]:
    def write(weight: Tensor) -> Written:
        width = weight.shape[1]
        size = group if group > 0 else width
        order = torch.arange(width) // size
        if shuffled:
            order = order[torch.randperm(width, generator=torch.Generator().manual_seed(1))]
        codes, scales, zeros, exact = integers(weight, bits, size, symmetric=symmetric, order=order)
        stored = (zeros - int(version == 1)) & ((1 << bits) - 1)
        tensors = {
            "qweight": packed(codes.t(), bits, 0),
            "qzeros": packed(stored.t(), bits, 1),
            "scales": scales.t().half().contiguous(),
            "g_idx": order.int(),
        }
        return tensors, exact

    return write


def gptq_config(bits: int, group: int, version: int = 1, **more: Any) -> dict[str, Any]:
    own = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False}
    return own | {"checkpoint_format": "gptq" if version == 1 else "gptq_v2"} | more


def awq(weight: Tensor) -> Written:
    codes, scales, zeros, exact = integers(weight, 4, 32, symmetric=False)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "qweight": packed(codes.t(), 4, 1, order),
        "qzeros": packed(zeros.t(), 4, 1, order),
        "scales": scales.t().half().contiguous(),
    }
    return tensors, exact


def pack_quantized(
    bits: int, group: int, *, symmetric: bool = True, shuffled: bool = False, plain: bool = False
) -> Callable[[Tensor], Written]:
    """``plain``: zero points are no words, as in older versions."""

    def write(weight: Tensor) -> Written:
        order = torch.arange(weight.shape[1]) // group
        if shuffled:
            order = order.flip(0)
        codes, scales, zeros, exact = integers(
            weight, bits, group, symmetric=symmetric, order=order
        )
        tensors = {
            "weight_packed": packed(codes, bits, 1),
            "weight_scale": scales.half(),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            middle = 1 << (bits - 1)
            zero = (zeros - middle).to(torch.int8) if plain else packed(zeros, bits, 0)
            tensors["weight_zero_point"] = zero
        if shuffled:
            tensors["weight_g_idx"] = order.int()
        return tensors, exact

    return write


def compressed_config(kind: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    own = {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}
    return own | {"quantization_status": "compressed", "ignore": ["lm_head"]} | more


def int_quantized(weight: Tensor) -> Written:
    scale = (weight.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
    codes = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def float_quantized(strategy: str) -> Callable[[Tensor], Written]:
    def write(weight: Tensor) -> Written:
        if strategy == "block":
            return float8_blocks(weight, "weight_scale")
        peak = weight.abs().amax(1, keepdim=True) if strategy == "channel" else weight.abs().amax()
        scale = (peak / 448).reshape(-1, 1) if strategy == "channel" else (peak / 448).reshape(1)
        codes = (weight / scale).to(torch.float8_e4m3fn)
        tensors = {"weight": codes, "weight_scale": scale, "input_scale": torch.ones(1)}
        return tensors, codes.float() * scale

    return write


def float8_blocks(weight: Tensor, name: str = "weight_scale_inv", size: int = 32) -> Written:
    out, width = weight.shape
    tiles = weight.view(out // size, size, width // size, size)
    scale = tiles.abs().amax((1, 3), keepdim=True) / 448
    codes = (tiles / scale).to(torch.float8_e4m3fn)
    exact = (codes.float() * scale).view(out, width)
    return {"weight": codes.view(out, width), name: scale[:, 0, :, 0].contiguous()}, exact


def float8_tensor(weight: Tensor) -> Written:
    scale = weight.abs().amax() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}, codes.float() * scale


def bnb_4bit(kind: str, *, nested: bool) -> Callable[[Tensor], Written]:
    table = NF4 if kind == "nf4" else BNB_FP4

    def write(weight: Tensor) -> Written:
        blocks = weight.reshape(-1, 64)
        absmax = blocks.abs().amax(1)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "float16"}
        state["shape"] = list(weight.shape)
        tensors = {"weight.quant_map": table}
        stored = absmax
        if nested:
            inner, offset = torch.linspace(-1, 1, 256), absmax.mean()
            outer = torch.stack([each.abs().amax() for each in (absmax - offset).split(256)])
            own = outer.repeat_interleave(256)[: len(absmax)]
            share = (absmax - offset) / own
            stored = (share[:, None] - inner).abs().argmin(1).to(torch.uint8)
            absmax = inner[stored.long()] * own + offset
            state |= {"nested_blocksize": 256, "nested_offset": offset.item()}
            state["nested_dtype"] = "float32"
            tensors |= {"weight.nested_absmax": outer, "weight.nested_quant_map": inner}
        codes = ((blocks / absmax[:, None])[..., None] - table).abs().argmin(-1)
        exact = (table[codes] * absmax[:, None]).view_as(weight)
        pairs = codes.view(-1, 2).to(torch.uint8)
        tensors["weight"] = (pairs[:, :1] << 4 | pairs[:, 1:]).contiguous()
        tensors["weight.absmax"] = stored
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = text
        return tensors, exact

    return write


def bnb_8bit(weight: Tensor) -> Written:
    peak = weight.abs().amax(1)
    codes = (weight * 127 / peak[:, None]).round().to(torch.int8)
    tensors = {"weight": codes, "SCB": peak, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, codes.float() * (peak / 127)[:, None]


def mxfp4(weight: Tensor) -> Written:
    """A stack (experts, out, in)."""
    groups = weight.unflatten(-1, (-1, 32))
    exponent = torch.log2(groups.abs().amax(-1, keepdim=True) / 6).ceil()
    codes = ((groups / 2**exponent)[..., None] - MXFP4).abs().argmin(-1)
    exact = (MXFP4[codes] * 2**exponent).view_as(weight)
    pairs = codes.unflatten(-1, (-1, 2)).to(torch.uint8)
    blocks = pairs[..., 0] | pairs[..., 1] << 4
    return {"blocks": blocks, "scales": (exponent[..., 0] + 127).to(torch.uint8)}, exact


BNB_NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BNB_INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
INT4_GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FLOAT8 = {"num_bits": 8, "type": "float"}
HALF = 2.0**-10  # of scales and zero points in half precision
ANEW = 0.01  # numbers that become int8
FORMATS = {
    "gptq": Format(gptq_config(4, 32), gptq(4, 32), "int4"),
    "gptq-64-asym": Format(gptq_config(4, 64), gptq(4, 64, symmetric=False), "int4", HALF),
    "gptq-v2-asym": Format(
        gptq_config(4, 32, 2), gptq(4, 32, symmetric=False, version=2), "int4", HALF
    ),
    "gptq-whole-rows": Format(gptq_config(4, -1), gptq(4, -1), "int4"),
    "gptq-2-bits": Format(gptq_config(2, 32), gptq(2, 32), "int4"),
    "gptq-8-bits": Format(gptq_config(8, 32), gptq(8, 32), "int8"),
    "gptq-8-bits-asym": Format(gptq_config(8, 32), gptq(8, 32, symmetric=False), "int8", ANEW),
    "gptq-act-order": Format(
        gptq_config(4, 32, desc_act=True), gptq(4, 32, shuffled=True), "int8", ANEW
    ),
    "awq": Format(AWQ, awq, "int4", HALF),
    "w4a16": Format(
        compressed_config("pack-quantized", INT4_GROUPS), pack_quantized(4, 32), "int4"
    ),
    "w4a16-asym": Format(
        compressed_config("pack-quantized", INT4_GROUPS | {"symmetric": False}),
        pack_quantized(4, 32, symmetric=False),
        "int4",
        HALF,
    ),
    "w4a16-asym-older": Format(
        compressed_config(
            "pack-quantized", INT4_GROUPS | {"symmetric": False}, quantization_status="frozen"
        ),
        pack_quantized(4, 32, symmetric=False, plain=True),
        "int4",
        HALF,
    ),
    "w4a16-act-order": Format(
        compressed_config("pack-quantized", INT4_GROUPS | {"actorder": "group"}),
        pack_quantized(4, 32, shuffled=True),
        "int8",
        ANEW,
    ),
    "w8a16": Format(
        compressed_config("pack-quantized", INT4_GROUPS | {"num_bits": 8}),
        pack_quantized(8, 32),
        "int8",
    ),
    "w8a8": Format(
        compressed_config("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        int_quantized,
        "int8",
    ),
    **{
        f"fp8-{strategy}": Format(
            compressed_config(
                "float-quantized", FLOAT8 | {"strategy": strategy, "block_structure": [32, 32]}
            ),
            float_quantized(strategy),
            "int8",
            ANEW,
        )
        for strategy in ("tensor", "channel", "block")
    },
    "fp8": Format(FP8 | {"weight_block_size": [32, 32]}, float8_blocks, "int8", ANEW),
    "fp8-one-scale": Format(FP8, float8_tensor, "int8", ANEW),
    "fp8-auto": Format(
        FP8 | {"activation_scheme": "static"}, float_quantized("tensor"), "int8", ANEW
    ),
    "nf4": Format(BNB_NF4, bnb_4bit("nf4", nested=False), "int8", ANEW),
    "nf4-nested": Format(BNB_NF4, bnb_4bit("nf4", nested=True), "int8", ANEW),
    "bnb-fp4": Format(
        BNB_NF4 | {"bnb_4bit_quant_type": "fp4"}, bnb_4bit("fp4", nested=True), "int8", ANEW
    ),
    "bnb-int8": Format(BNB_INT8, bnb_8bit, "int8", HALF),
}


def write_quantized(
    own: Format, folder: Path, config: Any = LLAMA
) -> tuple[tf.PreTrainedModel, list[str]]:
    """A folder with a tiny model in a format; the model of its very numbers, its quantised layers.

    Every layer but the last, and one more that stays as it is.
    """
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval().float()
    tensors, layers = {}, []
    for path, module in model.named_modules():
        is_kept = path.endswith(("lm_head", "layers.1.mlp.down_proj", "mlp.gate"))
        if type(module) is torch.nn.Linear and not is_kept:
            written, exact = own.write(module.weight.detach())
            with torch.no_grad():
                module.weight.copy_(exact)
            tensors |= {
                f"{path}.{name}": tensor.clone().contiguous() for name, tensor in written.items()
            }
            layers.append(f"{path}.weight")
    save(folder, model, own, tensors, layers)
    return model, layers


def save(
    folder: Path, model: Any, own: Format, tensors: dict[str, Tensor], made: list[str]
) -> None:
    """Write the ``tensors`` in the place of the parameters ``made`` of a model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in made:
                parameter.copy_(parameter.to(own.dtype))
    model.config.dtype = own.dtype
    model.config.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"quantization_config": own.config}))
    plain = {
        name: parameter.detach().to(own.dtype).contiguous()
        for name, parameter in model.named_parameters()
        if name not in made
    }
    save_file({**plain, **tensors}, folder / "model.safetensors", metadata={"format": "pt"})
