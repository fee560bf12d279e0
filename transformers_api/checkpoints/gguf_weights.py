"""The table of a GGUF model's weights: the parts of each parameter, and how it is made of them.

Names are mapped by the ``gguf`` package's own tables, orders of rows by what llama.cpp's converters
did. Nothing of a tensor is read here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gguf

from transformers_api.checkpoints import gguf_encoder
from transformers_api.checkpoints.headers.gguf_file import GgufHeader, GgufTensor, file_type
from transformers_api.errors import ModelLoadFailed

VERSION = 1
Op = dict[str, Any]
Shape = tuple[int, ...]
# No weights of a layer: factors of the rope, which are in the configuration.
_IGNORED = re.compile(
    r"rope_freqs\.weight|rope_factors_(long|short)\.weight|blk\.\d+\.attn_rot_embd\..*"
)
_EXPERTS = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.gate_up_proj(_bias)?")
_CORRECTION = re.compile(r"model\.layers\.(\d+)\.mlp\.e_score_correction_bias")
_NORM_MINUS_ONE = frozenset({"gemma2", "gemma3", "nemotron"})
_CONV1D = ("attn_qkv.weight", "ffn_down.weight", "ffn_up.weight", "attn_output.weight")


def build(header: GgufHeader, config: Any, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """``weights.json``. ``shapes``: of the model's parameters and stored buffers, tied ones once.

    Raises ModelLoadFailed for a parameter without a tensor, a tensor without a parameter, and a
    shape that does not fit.
    """
    architecture = header.metadata["general.architecture"]
    tensors = {tensor.name: tensor for tensor in header.tensors}
    sources = _sources(architecture, config, shapes, tensors)
    if missing := [name for name in shapes if name not in sources]:
        raise ModelLoadFailed(
            f"no tensor of the file is {missing[0]} of {config.architectures[0]}"
            + (f", nor {len(missing) - 1} others" if missing[1:] else "")
        )
    used = {name for names in sources.values() for name in names}
    if gguf_encoder.is_encoder(header.metadata):
        used.add("output.weight")  # which nobody asks for a token
    if surplus := [name for name in tensors if name not in used and not _IGNORED.fullmatch(name)]:
        raise ModelLoadFailed(
            f"tensor {surplus[0]} has no place in {config.architectures[0]}"
            + (f", nor have {len(surplus) - 1} others" if surplus[1:] else "")
        )
    table = {
        name: _parameter(architecture, config, shapes[name], _pieces(name, names, tensors))
        for name, names in sources.items()
    }
    return {
        "version": VERSION,
        "files": file_stamps(header),
        "file_type": file_type(header),
        "tensors": table,
    }


def file_stamps(header: GgufHeader) -> list[dict[str, Any]]:
    """The files as they are now: path, bytes, mtime_ns."""
    stats = [(path.resolve(), path.stat()) for path in header.files]
    return [
        {"path": str(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        for path, stat in stats
    ]


def _sources(
    architecture: str,
    config: Any,
    shapes: Mapping[str, Shape],
    tensors: Mapping[str, GgufTensor],
) -> dict[str, list[str]]:
    """Parameter -> names of the tensors that it is made of, one of them or gate and up."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in kinds:
        raise ModelLoadFailed(
            f"the architecture {architecture!r} (general.architecture) has no names of tensors"
        )
    names = gguf.get_tensor_name_map(kinds[architecture], 1)  # all layers have the same names
    sources: dict[str, list[str]] = {}
    if architecture == "nomic-bert":
        fused = {name: gguf_encoder.sources(name, tensors) for name in shapes}
        sources = {name: names for name, names in fused.items() if names}
    taken = {name for names in sources.values() for name in names}
    for depth in range(3):  # names of the model inside, where the whole one's are not listed
        for name in shapes:
            if name in sources:
                continue
            candidates = _special(name) if depth == 0 else []
            candidates += [[each] for each in _mapped(names, name, depth)]
            for group in candidates:
                if all(each in tensors and each not in taken for each in group):
                    sources[name] = group
                    taken.update(group)
                    break
    return {name: sources[name] for name in shapes if name in sources}


def _pieces(
    name: str, sources: Sequence[str], tensors: Mapping[str, GgufTensor]
) -> list[GgufTensor]:
    """The tensors of a parameter; of a fused one the rows that are the parameter's."""
    pieces = [tensors[source] for source in sources]
    third = gguf_encoder.third(name)
    if third is None or not sources[0].endswith("attn_qkv.weight"):
        return pieces
    whole = pieces[0]
    rows, size = whole.shape[0] // 3, whole.bytes // 3
    shape, offset = (rows, *whole.shape[1:]), whole.offset + third * size
    return [replace(whole, shape=shape, offset=offset, bytes=size)]


def _mapped(names: gguf.TensorNameMap, name: str, depth: int) -> Iterator[str]:
    """The tensors that may be a parameter's, by its name without its first ``depth`` parts."""
    parts = name.split(".")
    layer = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if depth and depth >= (len(parts) - 1 if layer is None else layer):
        return
    number = "0" if layer is None else parts[layer]
    if layer is not None:
        parts[layer] = "0"
    inner = ".".join(parts[depth:])
    for mapped in _mapped_in_layer_0(names, inner):
        yield mapped.replace("blk.0.", f"blk.{number}.", 1)


def _mapped_in_layer_0(names: gguf.TensorNameMap, name: str) -> Iterator[str]:
    stem, _, suffix = name.rpartition(".")
    if suffix in ("weight", "bias") and (mapped := names.get_name(stem)) is not None:
        yield f"{mapped}.{suffix}"
    if (mapped := names.get_name(name)) is not None:
        yield mapped
        yield f"{mapped}.weight"  # a stack of experts
    if name.endswith("_bias") and (mapped := names.get_name(name.removesuffix("_bias"))):
        yield f"{mapped}.bias"


def _special(name: str) -> list[list[str]]:
    """Groups of tensors for parameters that the tables do not know."""
    if match := _EXPERTS.fullmatch(name):
        suffix = "bias" if match[2] else "weight"
        return [[f"blk.{match[1]}.ffn_{which}_exps.{suffix}" for which in ("gate", "up")]]
    if match := _CORRECTION.fullmatch(name):
        return [[f"blk.{match[1]}.exp_probs_b.bias"]]
    return []


def _parameter(
    architecture: str, config: Any, shape: Shape, tensors: Sequence[GgufTensor]
) -> dict[str, Any]:
    ops = [_ops(architecture, config, tensor, shape) for tensor in tensors]
    join = None
    if len(tensors) > 1:
        join = {"dim": 1}
        if architecture == "gpt-oss":
            join = {"dim": len(shape) - 1, "interleave": True}
    made = [_shape_after(tensor, own) for tensor, own in zip(tensors, ops, strict=True)]
    whole = list(made[0])
    if join is not None:
        whole[join["dim"]] = sum(each[join["dim"]] for each in made)
    if tuple(whole) != shape:
        raise ModelLoadFailed(
            f"tensor {tensors[0].name} has the shape {list(tensors[0].shape)}, which makes "
            f"{whole} and not {list(shape)}"
        )
    parts = [_part(tensor, own) for tensor, own in zip(tensors, ops, strict=True)]
    return {"shape": list(shape), "parts": parts, "join": join}


def _part(tensor: GgufTensor, ops: list[Op]) -> dict[str, Any]:
    return {
        "file": tensor.file,
        "offset": tensor.offset,
        "bytes": tensor.bytes,
        "type": gguf.GGMLQuantizationType(tensor.kind).name,
        "shape": list(tensor.shape),
        "ops": ops,
    }


def _ops(architecture: str, config: Any, tensor: GgufTensor, shape: Shape) -> list[Op]:
    """The way back from what llama.cpp's converter of this architecture did to a tensor."""
    if architecture in _NORM_MINUS_ONE:
        return [{"op": "add", "value": -1}] if "norm.weight" in tensor.name else []
    own = _OPS.get(architecture)
    return own(config, tensor, shape) if own else []


def _llama(config: Any, tensor: GgufTensor, shape: Shape) -> list[Op]:
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    for part, count in heads.items():
        if part in tensor.name:
            if count < 1 or tensor.shape[0] % (2 * count):
                raise ModelLoadFailed(
                    f"tensor {tensor.name} has {tensor.shape[0]} rows, which are not pairs of "
                    f"{count} heads"
                )
            return [{"op": "heads", "heads": count}]
    return []


def _bloom(config: Any, tensor: GgufTensor, shape: Shape) -> list[Op]:
    if "attn_qkv" not in tensor.name:
        return []
    if config.n_head < 1 or tensor.shape[0] % (3 * config.n_head):
        raise ModelLoadFailed(
            f"tensor {tensor.name} has {tensor.shape[0]} rows, which are not q, k and v of "
            f"{config.n_head} heads"
        )
    return [{"op": "bloom_qkv", "heads": config.n_head}]


def _gpt2(config: Any, tensor: GgufTensor, shape: Shape) -> list[Op]:
    return [{"op": "transpose"}] if tensor.name.endswith(_CONV1D) else []


def _mamba(config: Any, tensor: GgufTensor, shape: Shape) -> list[Op]:
    if "ssm_conv1d.weight" in tensor.name:
        return [{"op": "unsqueeze", "dim": 1}]
    return [{"op": "log_neg"}] if "ssm_a" in tensor.name else []


def _lfm2(config: Any, tensor: GgufTensor, shape: Shape) -> list[Op]:
    return [{"op": "unsqueeze", "dim": 1}] if "shortconv.conv.weight" in tensor.name else []


def _shared_expert(config: Any, tensor: GgufTensor, shape: Shape) -> list[Op]:
    is_flat = "ffn_gate_inp_shexp" in tensor.name and len(tensor.shape) == 1
    return [{"op": "unsqueeze", "dim": 0}] if is_flat else []


def _gpt_oss(config: Any, tensor: GgufTensor, shape: Shape) -> list[Op]:
    """Experts multiply from the left there: (E, in, out)."""
    return [{"op": "transpose"}] if tensor.name.endswith("_exps.weight") else []


_OPS: dict[str, Callable[[Any, GgufTensor, Shape], list[Op]]] = {
    "llama": _llama,
    "bloom": _bloom,
    "gpt2": _gpt2,
    "mamba": _mamba,
    "lfm2": _lfm2,
    "qwen2moe": _shared_expert,
    "gpt-oss": _gpt_oss,
}


def _shape_after(tensor: GgufTensor, ops: Sequence[Op]) -> Shape:
    shape = tensor.shape
    for op in ops:
        match op["op"]:
            case "transpose":
                shape = (*shape[:-2], shape[-1], shape[-2])
            case "unsqueeze":
                shape = (*shape[: op["dim"]], 1, *shape[op["dim"] :])
    assert math.prod(shape) == tensor.elements
    return shape
