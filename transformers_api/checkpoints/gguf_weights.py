"""The table of a GGUF file's weights: which parameter of the model is which part of the file.

Names and conversions are those of transformers' own reader
(``transformers/modeling_gguf_pytorch_utils.py``); no tensor is read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM
from transformers import modeling_gguf_pytorch_utils as reader

from transformers_api.checkpoints.gguf_config import IN_CONFIG
from transformers_api.checkpoints.headers.gguf_file import GgufTensor
from transformers_api.errors import ModelLoadFailed

VERSION = 1
EXPERTS = re.compile(r"(?P<name>.*\.ffn_(?P<part>gate|down|up)_exps)\.weight")
# Architectures whose names in the gguf package are others than in transformers.
NAMES = {
    "cohere": "command-r",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "gpt_oss": "gpt-oss",
    "minimax_m2": "minimax-m2",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
# Parts of tensors' names -> what brings such a tensor of an architecture into the shape of the
# model's parameter; "heads" is the number in this field of the configuration.
OPERATIONS: list[tuple[type, tuple[str, ...], dict[str, Any], str | None]] = [
    (reader.LlamaTensorProcessor, (".attn_q.",), {"op": "heads"}, "num_attention_heads"),
    (reader.LlamaTensorProcessor, (".attn_k.",), {"op": "heads"}, "num_key_value_heads"),
    (reader.BloomTensorProcessor, ("attn_qkv",), {"op": "bloom_qkv"}, "n_head"),
    (
        reader.GPT2TensorProcessor,
        ("attn_qkv.weight", "ffn_down.weight", "ffn_up.weight", "attn_output.weight"),
        {"op": "transpose"},
        None,
    ),
    (reader.NemotronTensorProcessor, ("norm.weight",), {"op": "add", "value": -1}, None),
    (reader.Gemma2TensorProcessor, ("norm.weight",), {"op": "add", "value": -1}, None),
    (reader.MambaTensorProcessor, ("ssm_conv1d.weight",), {"op": "unsqueeze", "dim": 1}, None),
    (reader.MambaTensorProcessor, ("ssm_a",), {"op": "log_neg"}, None),
    (reader.Lfm2TensorProcessor, ("shortconv.conv.weight",), {"op": "unsqueeze", "dim": 1}, None),
    (reader.Qwen2MoeTensorProcessor, ("ffn_gate_inp_shexp",), {"op": "unsqueeze", "dim": 0}, None),
]

File = tuple[Path, Sequence[GgufTensor]]


def weight_table(
    files: Sequence[File], architecture: str, config: Any, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of ``weights.json`` for the files of a model.

    ``fields``: what transformers reads of the configuration. Raises ModelLoadFailed, naming it, for
    a tensor without a place in the model and for a parameter that no tensor is.
    """
    with torch.device("meta"):
        make: Any = AutoModelForCausalLM
        model = make.from_config(config)
    processor = _processor(architecture, fields)
    names = _parameter_names(model, config, processor)
    tensors: dict[str, dict[str, Any]] = {}
    for number, (_, of_file) in enumerate(files):
        for tensor in of_file:
            if tensor.name in IN_CONFIG:
                continue
            name, order = _place(tensor, names, processor)
            if name is None:
                raise ModelLoadFailed(
                    f"tensor {tensor.name} has no place in {type(model).__name__}, which "
                    f"general.architecture {architecture!r} stands for"
                )
            entry = tensors.setdefault(name, {"parts": {}})
            entry["parts"][order] = {
                "file": number,
                "offset": tensor.offset,
                "bytes": tensor.bytes,
                "type": gguf.GGMLQuantizationType(tensor.kind).name,
                "shape": list(tensor.shape),
                "ops": list(_operations(tensor, processor, fields)),
            }
    _complete(tensors, model, config)
    stats = [(path, path.stat()) for path, _ in files]
    described = [
        {"path": str(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        for path, stat in stats
    ]
    return {
        "version": VERSION,
        "class": type(model).__name__,
        "files": described,
        "tensors": tensors,
    }


def _processor(architecture: str, fields: Mapping[str, Any]) -> Any:
    kind = reader.TENSOR_PROCESSORS.get(architecture, reader.TensorProcessor)
    make: Any = kind
    return make(config=dict(fields))


def _parameter_names(model: Any, config: Any, processor: Any) -> dict[str, str]:
    """The name of a parameter by that of a tensor, as transformers maps them.

    A name without its first parts counts too, as files are also made of a model without its head;
    the fewer are left out, the better.
    """
    model_type = NAMES.get(config.model_type, config.model_type)
    number = next((key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == model_type), None)
    if number is None:
        raise ModelLoadFailed(f"the gguf package has no names for the architecture {model_type!r}")
    of_package = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    paths = [name.split(".") for name in model.state_dict()]
    names: dict[str, str] = {}
    for depth in range(max(map(len, paths))):
        deeper: dict[str, str] = {}
        for path in paths:
            if len(path) <= depth:
                continue
            outer = "".join(f"{part}." for part in path[:depth])
            own = processor.preprocess_name(".".join(path[depth:]))
            suffix = f".{path[-1]}" if path[-1] in ("weight", "bias") else ""
            tensor = of_package.get_name(own.removesuffix(suffix))
            if tensor is None:
                processor.perform_fallback_tensor_mapping(deeper, suffix, outer, own)
            else:
                deeper[tensor + suffix] = outer + own
        names = deeper | names
    return names


def _place(tensor: GgufTensor, names: Mapping[str, str], processor: Any) -> tuple[str | None, int]:
    """The parameter that a tensor is, or a part of, and which part."""
    if match := EXPERTS.fullmatch(tensor.name):
        name = names.get(match["name"], names.get(tensor.name))
        return name, 1 if match["part"] == "up" else 0
    if isinstance(processor, reader.GPT2TensorProcessor) and tensor.name == "output.weight":
        return "lm_head.weight", 0
    return names.get(tensor.name), 0


def _operations(
    tensor: GgufTensor, processor: Any, fields: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The steps from a tensor to the parameter."""
    for kind, parts, operation, field in OPERATIONS:
        if isinstance(processor, kind) and any(part in tensor.name for part in parts):
            if field is None:
                yield dict(operation)
            elif fields.get(field):  # without it transformers leaves them as they are
                yield {**operation, "heads": fields[field]}


def _complete(tensors: dict[str, dict[str, Any]], model: Any, config: Any) -> None:
    """Put each entry's parts in order, and the shape of its parameter beside them."""
    state = model.state_dict()
    tied = set(model.all_tied_weights_keys or ()) if config.tie_word_embeddings else set()
    for name in tied & tensors.keys():
        del tensors[name]  # the file has it twice; the model once
    missing = [name for name in state if name not in tensors and name not in tied]
    if missing:
        raise ModelLoadFailed(
            f"the file has no tensor for {', '.join(missing[:3])} of {type(model).__name__}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        )
    for name, entry in tensors.items():
        parts = entry["parts"]
        if sorted(parts) not in ([0], [0, 1]) or name not in state:
            raise ModelLoadFailed(f"{name} of {type(model).__name__} is not whole in the file")
        entry["shape"] = list(state[name].shape)
        entry["join"] = {"dim": 1} if len(parts) > 1 else None
        entry["parts"] = [parts[order] for order in sorted(parts)]
