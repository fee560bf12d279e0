from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.model_folders import model_files, write_files
from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.preflight import inspect_folder

SIZES = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}
EMBEDDING = {"model.embed_tokens.weight": ("F16", [32, 8])}
LAYERS = {f"model.layers.{index}.mlp.up_proj.weight": ("F16", [16, 8]) for index in range(2)}


def inspect(folder: Path, config: dict[str, Any], tensors: Any = None) -> None:
    inspect_folder(write_files(folder, model_files(config, tensors or EMBEDDING | LAYERS)))


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers is 1000000, but .* of 2 at most"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3"),
        ({"n_layer": 1 << 40}, "n_layer is"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, which is no size"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers is .many., which is no size"),
        ({"num_hidden_layers": 1e6}, "num_hidden_layers is 1000000.0, which is no size"),
        ({"vocab_size": 1 << 40}, "vocab_size is .* of 32 at most"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": -32}, "vocab_size is -32"),
        ({"hidden_size": 33}, "hidden_size is 33"),
        ({"intermediate_size": 1 << 40}, "intermediate_size is"),
        ({"intermediate_size": -16}, "intermediate_size is -16"),
        ({"num_attention_heads": 1 << 31}, "num_attention_heads is"),
        ({"head_dim": 1 << 31}, "head_dim is"),
        ({"num_local_experts": 1_000_000}, "num_local_experts is"),
        ({"num_labels": 1_000_000_000}, "num_labels is"),
        ({"max_position_embeddings": 1 << 60}, "max_position_embeddings is"),
        ({"text_config": {"num_hidden_layers": 1_000_000}}, "text_config.num_hidden_layers is"),
        ({"vision_config": {"depth": 1, "num_hidden_layers": 1 << 30}}, "vision_config.num"),
        ({"a": {"b": {"vocab_size": 1 << 40}}}, "a.b.vocab_size is"),
        ({"layer_sizes": {"hidden_size": [8, 1 << 40]}}, "layer_sizes.hidden_size is"),
    ],
)
def test_more_than_the_weights_hold_is_refused_by_field(
    tmp_path: Path, more: dict[str, Any], field: str
) -> None:
    with pytest.raises(ModelLoadFailed, match=rf"config\.json: {field}"):
        inspect(tmp_path, CONFIG | more)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"max_position_embeddings": 10_485_760, "sliding_window": 1 << 20},
        {"max_window_layers": 28, "num_key_value_heads": None, "num_nextn_predict_layers": 1},
        {"bos_token_id": 128_000, "eos_token_id": [128_001, 128_009], "pad_token_id": -1},
        {"vision_config": {"num_hidden_layers": 27, "hidden_size": 1152}},
        {"quantization_config": {"group_size": 1 << 40}, "rope_scaling": {"factor": 1e30}},
        {"id2label": {"0": "A"}, "router_aux_loss_coef": 0.001, "attn_size": "eager"},
        {"num_local_experts": 384, "moe_intermediate_size": 2048},
        {"intermediate_size": [16, 16]},
    ],
)
def test_what_other_models_say_passes(tmp_path: Path, more: dict[str, Any]) -> None:
    inspect(tmp_path, CONFIG | more)


def test_layers_that_share_their_weights_pass(tmp_path: Path) -> None:
    shared = EMBEDDING | {"albert_layer_groups.0.albert_layers.0.ffn.weight": ("F16", [16, 8])}
    inspect(tmp_path, CONFIG | {"num_hidden_layers": 12}, shared)
    with pytest.raises(ModelLoadFailed, match="num_hidden_layers"):
        inspect(tmp_path, CONFIG | {"num_hidden_layers": 1 << 20}, shared)


def test_nesting_without_an_end_is_refused(tmp_path: Path) -> None:
    config: dict[str, Any] = {}
    for _ in range(100):
        config = {"part": config}
    with pytest.raises(ModelLoadFailed, match="nested too deep"):
        inspect(tmp_path, CONFIG | config)
