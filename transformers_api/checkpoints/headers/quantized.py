"""Quantised weights of a checkpoint, by its quantization_config and the headers of its files.

Which tensors of the files are one parameter together, of which shape, and how it is made of them:
by the names and formats of the libraries that write them. No weight is read here.
"""

from __future__ import annotations

import functools
import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers_api.checkpoints.headers.path_pattern import PathPattern
from transformers_api.checkpoints.headers.quantized_parts import (
    FLOAT8,
    Files,
    QuantizedTensor,
    check_parts,
)
from transformers_api.errors import ModelLoadFailed

Config = Mapping[str, Any]
CODES = (*FLOAT8, "I8", "U8", "I32")
_pattern = functools.lru_cache(PathPattern)
MAX_STATE_BYTES = 1 << 20  # of a JSON text in a tensor


Quantized = Iterator[QuantizedTensor]


def quantization_of(config: Config) -> Config | None:
    """The quantization_config of a config.json that names its method; None: nothing is quantised.

    ``compression_config`` is an older name of it.
    """
    for name in ("quantization_config", "compression_config"):
        written = config.get(name)
        if isinstance(written, dict) and isinstance(written.get("quant_method"), str):
            return written
    return None


def check_method(quantization: Config, model_type: Any = None) -> None:
    """Refuse a configuration of weights that nobody here reads. Raises ModelLoadFailed."""
    method = quantization["quant_method"]
    if method in BY_TRANSFORMERS:
        return
    if method not in READERS:
        raise _unreadable(quantization, "quant_method", [*READERS, *BY_TRANSFORMERS])
    READERS[method][0](quantization)
    if model_type in TURNED:
        raise ModelLoadFailed(
            f"{method} weights of {model_type} cannot be read: its layers have them the other way "
            "round; take the model that it was made from, or a GGUF file"
        )


def read_quantized(quantization: Config, files: Files) -> dict[str, QuantizedTensor]:
    """The quantised parameters by their names. Raises ModelLoadFailed."""
    check_method(quantization)
    _, read = READERS[quantization["quant_method"]]
    quantized = {each.name: each for each in read(quantization, files)}
    for each in quantized.values():
        check_parts(each, files)
    parts = {part for each in quantized.values() for part in each.parts.values()}
    for name in sorted(files.tensors.keys() - parts):
        dtype = files.tensors[name].dtype
        if re.search(_PARTS[quantization["quant_method"]], name):
            raise ModelLoadFailed(f"tensor {name} is a part of a weight that is not there")
        is_code = dtype in FLOAT8 or (dtype in CODES and name.endswith("weight"))
        if is_code and not left_out(name):
            raise ModelLoadFailed(
                f"tensor {name} is {dtype}, and nothing beside it says what its numbers mean"
            )
    return quantized


def left_out(name: str) -> bool:
    """True for a tensor that is no weight: ranges of activations, above all."""
    return re.search(_NO_WEIGHTS, name) is not None


_WORDS = re.compile(r"\.(qweight|qzeros|scales|g_idx)$")
_PARTS = {
    "gptq": _WORDS,
    "awq": _WORDS,
    "compressed-tensors": re.compile(r"\.weight_(packed|scale|zero_point|shape|g_idx)$"),
    "fp8": re.compile(r"_scale_inv$"),
    "mxfp4": re.compile(r"_(blocks|scales)$"),
    "bitsandbytes": re.compile(
        r"\.(SCB|absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$"
    ),
}
_NO_WEIGHTS = re.compile(
    r"\.((input|output|activation)_(scale|zero_point|global_scale)|[qkv]_scale|[qkv]_zero_point"
    r"|weight_format)$"
)


def _unreadable(config: Config, name: str, allowed: Any) -> ModelLoadFailed:
    readable = ", ".join(str(each) for each in allowed)
    return ModelLoadFailed(
        f"quantization_config.{name} is {config.get(name)!r}, which cannot be read here, but "
        f"{readable}; take the model that it was made from, or a GGUF file"
    )


def _require(config: Config, name: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
    value = config.get(name, default)
    if value not in allowed or isinstance(value, float):  # 4.0 is no number of bits
        raise _unreadable(config, name, allowed)
    return value


# -- GPTQ and AWQ: int32 of several codes, zero points in the same form


def _check_gptq(config: Config) -> None:
    _require(config, "bits", (2, 4, 8))
    _require(config, "checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    _require(config, "is_marlin_format", (False, None))


def _gptq(config: Config, files: Files) -> Quantized:
    is_first = config.get("checkpoint_format", "gptq") == "gptq"  # stores zero points less one
    for stem in _stems(files, ".qweight"):
        parts = files.parts(stem, ".qweight", ".qzeros", ".scales", optional=(".g_idx",))
        groups, out = _two(files, parts["scales"])
        bits = _two(files, parts["qzeros"])[1] * 32 // out  # layers may differ
        if bits not in (2, 4, 8):
            raise ModelLoadFailed(f"tensor {parts['qzeros']} has zero points of {bits} bits")
        width = _two(files, parts["qweight"])[0] * 32 // bits
        facts = {
            "zero_offset": int(is_first),
            "group": _group(config.get("group_size"), width, groups),
            "is_reordered": bool(config.get("desc_act")) and "g_idx" in parts and groups > 1,
        }
        yield QuantizedTensor(f"{stem}.weight", (out, width), "gptq", bits, parts, facts)


def _check_awq(config: Config) -> None:
    _require({"bits": config.get("bits", config.get("w_bit"))}, "bits", (4,))
    version = str(config.get("version", "gemm")).lower()
    _require({"version": version}, "version", ("gemm",))
    if config.get("backend") == "llm-awq":
        raise _unreadable(config, "backend", ("autoawq",))


def _awq(config: Config, files: Files) -> Quantized:
    for stem in _stems(files, ".qweight"):
        parts = files.parts(stem, ".qweight", ".qzeros", ".scales")
        groups, out = _two(files, parts["scales"])
        width = _two(files, parts["qweight"])[0]
        size = config.get("group_size", config.get("q_group_size"))
        facts = {"group": _group(size, width, groups)}
        yield QuantizedTensor(f"{stem}.weight", (out, width), "awq", 4, parts, facts)


def _group(size: Any, width: int, groups: int) -> int:
    """Inputs of a group: as configured where that fits the scales."""
    if type(size) is int and size > 0 and -(-width // size) == groups:
        return size
    return -(-width // groups)


# -- compressed-tensors

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "dense")


def _check_compressed(config: Config) -> None:
    groups: Any = config.get("config_groups")
    for name in ("sparsity_config", "transform_config"):
        own = config.get(name) or {}
        if own and not (isinstance(own, dict) and own.get("format") == "dense"):
            raise _unreadable(config, name, ("none",))
    _require(config, "quantization_status", ("compressed", "frozen"), "compressed")
    if not isinstance(groups, dict) or not all(isinstance(each, dict) for each in groups.values()):
        raise _unreadable(config, "config_groups", ("an object of groups",))
    for name, group in groups.items():
        for owner in (group, config):
            if owner.get("format") not in (None, "mixed-precision"):
                _require({"format": owner["format"]}, "format", _FORMATS)
        _check_targets(group.get("targets"), f"config_groups.{name}.targets")
        weights = group.get("weights") or {}
        at = f"config_groups.{name}.weights"
        if not isinstance(weights, dict):
            raise _unreadable({at: weights}, at, ("an object", "null"))
        _check_block(weights.get("block_structure"), f"{at}.block_structure")
        kinds = {"int": (4, 8), "float": (8,)}
        kind = _require({f"{at}.type": weights.get("type", "int")}, f"{at}.type", tuple(kinds))
        _require({f"{at}.num_bits": weights.get("num_bits", 8)}, f"{at}.num_bits", kinds[kind])


def _check_targets(targets: Any, name: str) -> None:
    if not isinstance(targets, list | None):
        raise _unreadable({name: targets}, name, ("a list", "null"))
    for target in map(str, targets or ()):
        try:
            _pattern(target.removeprefix("re:") if target.startswith("re:") else "")
        except ValueError as error:
            raise _unreadable({name: target}, name, (f"regular expressions ({error})",)) from None


def _compressed(config: Config, files: Files) -> Quantized:
    for stem in _stems(files, ".weight_packed"):
        yield _packed(config, files, stem)
    for stem in _stems(files, ".weight_scale"):
        weight = files.tensors.get(f"{stem}.weight")
        if weight is None:
            continue
        parts = files.parts(stem, ".weight", ".weight_scale", optional=(".weight_zero_point",))
        if weight.dtype in FLOAT8:
            block = _weights_of(config, stem).get("block_structure")
            yield _float8(f"{stem}.weight", weight.shape, parts, files, block)
        elif weight.dtype == "I8":
            groups = _groups_of(files.shape(parts["weight_scale"]))
            facts = {"group": _group(None, _two(files, weight.name)[1], groups)}
            yield QuantizedTensor(f"{stem}.weight", weight.shape, "int8", 8, parts, facts)
        else:
            raise ModelLoadFailed(f"tensor {weight.name} has scales, and is {weight.dtype}")


def _packed(config: Config, files: Files, stem: str) -> QuantizedTensor:
    weights = _weights_of(config, stem)
    bits = weights.get("num_bits", 4)
    optional = (".weight_zero_point", ".weight_g_idx")
    parts = files.parts(stem, ".weight_packed", ".weight_scale", ".weight_shape", optional=optional)
    entry = files.tensors[parts["weight_shape"]]
    form = {"I64": "<2q", "I32": "<2i"}.get(entry.dtype)
    if form is None or entry.shape != (2,):
        raise ModelLoadFailed(f"tensor {entry.name} is no shape of a matrix")
    out, width = struct.unpack(form, files.read(entry.name))
    packed = files.shape(parts["weight_packed"])
    if packed != (out, -(-width * bits // 32)):
        raise ModelLoadFailed(f"tensor {parts['weight_packed']} is no {bits} bits of {out, width}")
    groups = _groups_of(files.shape(parts["weight_scale"]))
    facts = {
        "group": _group(weights.get("group_size"), width, groups),
        "is_reordered": "weight_g_idx" in parts and groups > 1,
    }
    return QuantizedTensor(f"{stem}.weight", (out, width), "packed", bits, parts, facts)


def _groups_of(scale: tuple[int, ...]) -> int:
    return scale[1] if len(scale) > 1 else 1


def _weights_of(config: Config, stem: str) -> Config:
    """The scheme of a layer: by its name, else the first one for a class of layers."""
    groups = [group for group in config["config_groups"].values() if group.get("weights")]
    for group in groups:
        if any(_is_named(str(target), stem) for target in group.get("targets") or ()):
            weights: Config = group["weights"]
            return weights
    return groups[0]["weights"] if groups else {}


def _is_named(target: str, stem: str) -> bool:
    if target.startswith("re:"):
        return _pattern(target.removeprefix("re:")).is_start(stem)
    return target == stem


# -- FP8, MXFP4, bitsandbytes


def _check_fp8(config: Config) -> None:
    _check_block(config.get("weight_block_size"), "weight_block_size")


def _check_block(block: Any, name: str) -> None:
    is_pair = isinstance(block, list) and len(block) == 2
    if block is not None and not (is_pair and all(type(n) is int and n > 0 for n in block)):
        raise _unreadable({name: block}, name, ("two sizes", "null"))


def _fp8(config: Config, files: Files) -> Quantized:
    ends = "_scale_inv", ".weight_scale"  # the second as AutoFP8 writes it
    for scale in [name for name in files.tensors if name.endswith(ends)]:
        weight = scale.removesuffix("_inv").removesuffix("_scale")
        if weight not in files.tensors or files.tensors[weight].dtype not in FLOAT8:
            raise ModelLoadFailed(f"tensor {scale} belongs to no weight of eight bits")
        parts = {"weight": weight, "weight_scale": scale}
        shape = files.shape(weight)
        yield _float8(weight, shape, parts, files, config.get("weight_block_size"))


def _float8(
    name: str, shape: tuple[int, ...], parts: Mapping[str, str], files: Files, block: Any
) -> QuantizedTensor:
    """``block``: (rows, columns) that share a scale, where scales are not those of rows."""
    scale = files.shape(parts["weight_scale"])
    if len(shape) < 2:
        _two(files, parts["weight"])  # says what is wrong
    rows, columns = ((*scale, 1, 1) if len(scale) < 2 else scale[-2:])[:2]
    if len(scale) == 1:
        rows, columns = scale[0], 1
    own = (-(-shape[-2] // rows), -(-shape[-1] // columns))
    if block and (rows, columns) != (shape[-2], 1) and rows * columns > 1:
        own = tuple(block)
    if (-(-shape[-2] // own[0]), -(-shape[-1] // own[1])) != (rows, columns):
        raise ModelLoadFailed(f"tensor {parts['weight_scale']} has no scales of {list(shape)}")
    return QuantizedTensor(name, shape, "float8", 8, parts, {"block": own})


def _mxfp4(config: Config, files: Files) -> Quantized:
    for stem in _stems(files, "_blocks"):
        parts = files.parts(stem, "_blocks", "_scales")
        if len(files.shape(parts["blocks"])) != 4:
            raise ModelLoadFailed(f"tensor {parts['blocks']} is no stack of experts' blocks")
        experts, out, groups, size = files.shape(parts["blocks"])
        shape = experts, groups * size * 2, out  # experts multiply from the left
        yield QuantizedTensor(stem, shape, "mxfp4", 4, parts)


def _check_bitsandbytes(config: Config) -> None:
    if config.get("load_in_4bit"):
        _require(config, "bnb_4bit_quant_type", ("nf4", "fp4"), "fp4")


def _bitsandbytes(config: Config, files: Files) -> Quantized:
    for stem in _stems(files, ".SCB"):
        parts = files.parts(stem, ".weight", ".SCB", optional=(".weight_format",))
        shape = _two(files, parts["weight"])
        facts = {"group": shape[1]}
        yield QuantizedTensor(f"{stem}.weight", shape, "bnb8", 8, parts, facts)
    for kind in ("nf4", "fp4"):
        for name in _stems(files, f".quant_state.bitsandbytes__{kind}"):
            state_name = f"{name}.quant_state.bitsandbytes__{kind}"
            if files.tensors[state_name].bytes > MAX_STATE_BYTES:
                raise ModelLoadFailed(f"tensor {state_name} is larger than any state should be")
            try:
                state = json.loads(files.read(state_name))
                out, width = state["shape"]
                facts = {key: state.get(key) for key in _STATE} | {"blocksize": state["blocksize"]}
                sizes = (out, width, facts["blocksize"])
                if not all(type(size) is int and size > 0 for size in sizes):
                    raise ValueError("shape and blocksize are no sizes")
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                raise ModelLoadFailed(f"tensor {name} has a state that is none: {error}") from None
            optional = (".nested_absmax", ".nested_quant_map")
            parts = files.parts(name, ".absmax", ".quant_map", optional=optional)
            files.shape(name)
            parts |= {"weight": name, "state": state_name}
            yield QuantizedTensor(name, (out, width), "bnb4", 4, parts, facts)


_STATE = ("nested_blocksize", "nested_offset")


def _stems(files: Files, end: str) -> list[str]:
    return [name.removesuffix(end) for name in files.tensors if name.endswith(end)]


def _two(files: Files, name: str) -> tuple[int, int]:
    shape = files.shape(name)
    if len(shape) != 2:
        raise ModelLoadFailed(f"tensor {name} has the shape {list(shape)}, which is no matrix's")
    return shape[0], shape[1]


def _anything(config: Config) -> None:
    """No field of it matters."""


READERS: Mapping[str, tuple[Callable[[Config], None], Callable[[Config, Files], Quantized]]] = {
    "awq": (_check_awq, _awq),
    "bitsandbytes": (_check_bitsandbytes, _bitsandbytes),
    "compressed-tensors": (_check_compressed, _compressed),
    "fp8": (_check_fp8, _fp8),
    "gptq": (_check_gptq, _gptq),
    "mxfp4": (_anything, _mxfp4),
}
TURNED = ("gpt2", "openai-gpt", "imagegpt")  # whose layers are Conv1D
BY_TRANSFORMERS = ("bitnet",)  # whose layers compute otherwise, and need no package
