"""A slice of the sweep over transformers' models: families that no other test loads."""

from __future__ import annotations

import pytest

from benchmarks.architectures import PATHS, Outcome, summary, sweep
from benchmarks.tiny_models import MODEL_TYPES, VARIANTS, tiny_config

NATIVE, BATCHED, ALONE, UNSERVED = PATHS
SLICE = {
    NATIVE: [
        "exaone4",
        "granite",
        "modernbert-decoder",
        "olmo3",
        "apertus",
        "bart",
        "bloom",
        "codegen",
        "cohere2",
        "deepseek_v3",
        "falcon",
        "falcon, alibi",
        "gemma3n_text",
        "gemma4_text",
        "glm4_moe",
        "gpt_neo",
        "hunyuan_v1_moe",
        "jamba",
        "kimi_linear",
        "mamba2",
        "mimo_v2_flash",
        "mpt",
        "nemotron_h",
        "phi4_multimodal, longrope",
        "qwen3_5_moe_text",
        "smollm3",
        "starcoder2",
        "qwen2, windows",
        "xglm",
        "zamba2",
        "zaya",
    ],
    BATCHED: [
        "glm_moe_dsa",
        "llama4_text",
        "longcat_flash",
        "phimoe, longrope",
    ],
    ALONE: [
        "doge",
        "minicpm3, longrope",
        "moshi",
        "recurrent_gemma",
        "rwkv",
        "xlstm",
    ],
    UNSERVED: ["bert", "xlnet", "gemma4_assistant"],
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_models_answer_as_generate_does_on_the_path_that_they_take(native_default):
    names = [name for group in SLICE.values() for name in group]
    outcomes = list(sweep(names))
    assert [outcome.name for outcome in outcomes] == names
    assert {outcome.name: outcome.faults for outcome in outcomes if outcome.faults} == {}
    if native_default is not None:
        paths = {path: [o.name for o in outcomes if o.path == path] for path in PATHS}
        assert paths == SLICE


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_model_that_hangs_or_ends_its_worker_does_not_end_the_sweep():
    outcomes = list(sweep(["no such model", "llama"], timeout_s=60))
    assert [outcome.name for outcome in outcomes] == ["no such model", "llama"]
    assert "no such model" in outcomes[0].reason
    assert outcomes[1].faults == ()
    (hanging,) = sweep(["llama"], timeout_s=0.01)
    assert hanging.faults == ("nothing within 0.01 s",)


def test_the_tables_say_how_many_take_each_path_and_why_the_others_do_not():
    ahead = "C cannot be run as a causal language model: what it says of a token depends on x"
    text = summary(
        [
            Outcome("a", NATIVE),
            Outcome("b", NATIVE, faults=("alone: other tokens",)),
            Outcome("c", UNSERVED, ahead),
            Outcome("d", UNSERVED, ahead.replace("C", "D")),
        ]
    )
    assert f"| {NATIVE} | 2 | `a`, `b` |" in text
    assert "- `c`, `d`: what they say of a token depends on x." in text
    assert "Wrong: `b`." in text


@pytest.mark.parametrize("name", ["llama", "gemma3_text", *VARIANTS])
def test_configurations_are_tiny(name):
    config = tiny_config(name).get_text_config(decoder=True)
    assert config.hidden_size == 64
    assert config.num_hidden_layers <= 4
    assert len(MODEL_TYPES) > 150
