"""The rope of a GGUF file, by the frequencies that the model rotates with in the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

from tests.checkpoints import gguf_models
from transformers_api.checkpoints.sidecar import write_sidecar
from transformers_api.errors import ModelLoadFailed

THETA = 10000.0


def config_of(folder: Path, architecture: str = "llama", **options: Any) -> Any:
    weights = gguf_models.tensors(architecture) | options.pop("factors", {})
    source = gguf_models.write(folder / "m.gguf", architecture, weights, options)
    write_sidecar(source, folder / "sidecar", lambda share, what: None)
    return AutoConfig.from_pretrained(folder / "sidecar")


def frequencies(config: Any) -> tuple[torch.Tensor, float]:
    rope = LlamaRotaryEmbedding(config)
    return rope.inv_freq, rope.attention_scaling


def plain() -> torch.Tensor:
    size = gguf_models.HEAD
    return 1 / THETA ** (torch.arange(0, size, 2) / size)


def llama3(factor: float, **options: Any) -> numpy.ndarray:
    """The factors that llama.cpp's converter writes for these parameters."""
    parameters = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | options
    parameters.setdefault("original_max_position_embeddings", 8192)
    own = {"rope_type": "llama3", "rope_theta": THETA, "factor": factor, **parameters}
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, rope_parameters=own, max_position_embeddings=1 << 17
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return (plain() / scaled).numpy().astype(numpy.float32)


@pytest.mark.parametrize(
    ("factors", "kind"),
    [
        pytest.param(llama3(8.0), "llama3", id="llama-3.1"),
        pytest.param(llama3(32.0), "llama3", id="llama-3.2"),
        pytest.param(llama3(16.0), "llama3", id="16"),
        pytest.param(llama3(8.0, original_max_position_embeddings=64), "longrope", id="short"),
        pytest.param(llama3(8.0, high_freq_factor=6.0), "longrope", id="steeper"),
        pytest.param(numpy.array([1, 2, 3.5, 7], numpy.float32), "longrope", id="any"),
    ],
)
def test_factors_divide_each_frequency(factors: numpy.ndarray, kind: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, factors={"rope_freqs.weight": factors})
    made, scaling = frequencies(config)
    assert config.rope_parameters["rope_type"] == kind
    torch.testing.assert_close(made, plain() / torch.tensor(factors), rtol=2e-5, atol=0)
    assert scaling == 1.0


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_that_cannot_be_are_refused(factor: float, tmp_path: Path) -> None:
    factors = numpy.array([1, 1, 1, factor], numpy.float32)
    with pytest.raises(ModelLoadFailed, match=r"rope_freqs\.weight has factors"):
        config_of(tmp_path, factors={"rope_freqs.weight": factors})


@pytest.mark.parametrize("factor", [2.0, 4.0, 8.0])
def test_linear_scaling_divides_all_alike(factor: float, tmp_path: Path) -> None:
    options = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": factor}
    made, scaling = frequencies(config_of(tmp_path, **options))
    torch.testing.assert_close(made, plain() / factor)
    assert scaling == 1.0


def test_yarn_is_that_of_the_original_length(tmp_path: Path) -> None:
    options = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 64,
    }
    rope = config_of(tmp_path, "qwen2", **options).rope_parameters
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert rope == expected | {"rope_theta": THETA}


def test_long_and_short_factors_are_those_of_the_file(tmp_path: Path) -> None:
    long, short = (numpy.array([1, 2, 3, 4], numpy.float32) * times for times in (4, 1))
    config = config_of(
        tmp_path,
        "phi3",
        factors={"rope_factors_long.weight": long, "rope_factors_short.weight": short},
        **{"phi3.rope.scaling.original_context_length": 64},
    )
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["long_factor"]) == ("longrope", long.tolist())
    assert (rope["short_factor"], rope["original_max_position_embeddings"]) == (short.tolist(), 64)


def test_gemma_3_scales_only_layers_that_see_everything(tmp_path: Path) -> None:
    options = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    rope = config_of(tmp_path, "gemma3", **options).rope_parameters
    assert rope["full_attention"]["rope_type"] == "linear"
    assert rope["full_attention"]["factor"] == 8.0
    assert rope["sliding_attention"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_a_scaling_that_is_unknown_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match=r"llama\.rope\.scaling\.type is 'su'"):
        config_of(tmp_path, **{"llama.rope.scaling.type": "su"})
