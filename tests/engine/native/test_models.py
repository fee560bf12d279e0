"""Kinds of models that run on the kernels: each answers as ``generate()`` does, in any company."""

from __future__ import annotations

import pytest

from benchmarks.architectures import PATHS, examine

MODELS = {
    "experts that softmax chooses": "qwen3_moe",
    "experts beside shared ones, latent attention": "deepseek_v3",
    "latent attention without experts": "minicpm3",
    "rope of two lengths": "phi3, longrope",
    "rope that grows": "llama, dynamic",
    "interleaved rope": "cohere",
}


@pytest.mark.parametrize("name", MODELS.values(), ids=MODELS.keys())
def test_a_model_runs_on_the_kernels_and_answers_as_generate_does(name, native_cache, tmp_path):
    outcome = examine(name, tmp_path, native_cache)
    assert (outcome.path, outcome.faults) == (PATHS[0], ()), outcome.reason
