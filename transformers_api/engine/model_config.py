"""A config.json without the settings that do not matter here, in spellings that transformers reads.

How attention is computed, what a forward pass returns, how the weights were kept in memory: a
server decides these itself, and transformers refuses a model for what it cannot do of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DTYPES = {
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
    "float64": "float64",
    "double": "float64",
}
ATTENTION = ("eager", "sdpa")
_DTYPE_FIELDS = ("dtype", "torch_dtype")
_ATTENTION_FIELDS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_IGNORED = frozenset(
    {
        "experts_implementation",
        "_experts_implementation",
        "gradient_checkpointing",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torchscript",
        "use_return_dict",
    }
)


def neutral(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with what matters; its sections, such as text_config, likewise."""
    result: dict[str, Any] = {}
    for name, value in config.items():
        if name in _IGNORED or (name == "quantization_config" and not value):
            continue
        if name in _ATTENTION_FIELDS and value not in ATTENTION:
            continue
        if name in _DTYPE_FIELDS and not isinstance(value, dict):
            if (dtype := _dtype(value)) is not None:
                result[name] = dtype
            continue
        result[name] = neutral(value) if isinstance(value, dict) else value
    return result


def _dtype(value: Any) -> str | None:
    """None for what is no dtype of weights: those of the file are then taken."""
    name = value.lower().removeprefix("torch.") if isinstance(value, str) else ""
    return DTYPES.get(name)
