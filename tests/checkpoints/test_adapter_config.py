"""adapter_config.json: what peft's keys mean, and those that are refused by name."""

from __future__ import annotations

import math
import time

import pytest

from transformers_api.checkpoints.headers.adapter_config import parse_adapter_config
from transformers_api.errors import ModelLoadFailed

PATH = "model.layers.11.self_attn.q_proj"
PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}

UNSLOTH = (  # as such adapters come
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|ffn|dense)"
    r"\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)


def parsed(**keys):
    return parse_adapter_config(PLAIN | keys, "adapter_config.json")


@pytest.mark.parametrize(
    ("keys", "path", "is_targeted"),
    [
        ({}, PATH, True),
        ({}, "q_proj", True),
        ({}, "model.layers.11.self_attn.xq_proj", False),
        ({"target_modules": ["self_attn.q_proj", "v_proj"]}, PATH, True),
        ({"target_modules": r".*\.layers\.1\d\..*q_proj"}, PATH, True),
        ({"target_modules": r"layers\.11"}, PATH, False),
        ({"target_modules": "all-linear"}, PATH, True),
        ({"target_modules": "all-linear"}, "lm_head", False),
        ({"target_modules": ["lm_head"]}, "lm_head", True),
        ({"exclude_modules": ["q_proj"]}, PATH, False),
        ({"exclude_modules": r".*\.11\..*"}, PATH, False),
        ({"exclude_modules": r".*\.12\..*"}, PATH, True),
        ({"layers_to_transform": [3, 11]}, PATH, True),
        ({"layers_to_transform": 11}, PATH, True),
        ({"layers_to_transform": 0}, "model.layers.0.self_attn.q_proj", True),
        ({"layers_to_transform": [3]}, PATH, False),
        ({"layers_to_transform": []}, PATH, True),
        ({"layers_to_transform": [11], "layers_pattern": "layers"}, PATH, True),
        ({"layers_to_transform": [11], "layers_pattern": ["h", "blocks"]}, PATH, False),
        ({"layers_to_transform": [11]}, "q_proj", False),
        ({"layers_to_transform": [11], "layers_pattern": "(lay)(?:er|x)s"}, PATH, True),
        ({"layers_to_transform": [11], "layers_pattern": "lay.*"}, PATH, True),
        ({"layers_to_transform": [2]}, "model.layers.1.experts.2.q_proj", True),
        ({"target_modules": UNSLOTH}, PATH, True),
        ({"target_modules": UNSLOTH}, "model.language.3.mlp.x.up_proj", True),
        ({"target_modules": UNSLOTH}, "model.layers.3.mlp.router", False),
    ],
)
def test_the_layers_are_those_that_peft_would_adapt(keys, path, is_targeted):
    assert parsed(**keys).targets_layer(path) is is_targeted


@pytest.mark.parametrize(
    ("keys", "rank", "scale"),
    [
        ({}, 8, 2),
        ({"lora_alpha": 4.0}, 8, 0.5),
        ({"use_rslora": True}, 8, 16 / math.sqrt(8)),
        ({"rank_pattern": {"q_proj": 2}}, 2, 8),
        ({"rank_pattern": {"v_proj": 2}}, 8, 2),
        ({"rank_pattern": {r"layers\.1\d\..*": 32, "q_proj": 2}}, 32, 0.5),
        ({"alpha_pattern": {"self_attn.q_proj": 1}}, 8, 1 / 8),
        ({"alpha_pattern": {"^model.layers.11.self_attn.q_proj": 24}}, 8, 3),
        (
            {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 1}, "use_rslora": True},
            4,
            0.5,
        ),
    ],
)
def test_rank_and_scale_are_those_of_the_layer(keys, rank, scale):
    config = parsed(**keys)
    assert config.rank_of(PATH) == rank
    assert config.scale_of(PATH) == pytest.approx(scale)


def test_keys_that_change_nothing_are_left_alone():
    nothing = (
        {"lora_dropout": 0.3, "inference_mode": False, "peft_version": "0.99", "new": None},
        {"use_dora": False, "modules_to_save": [], "target_parameters": None},
        {"init_lora_weights": "gaussian", "fan_in_fan_out": True},
        {"megatron_core": "megatron.core", "runtime_config": {}},
    )
    plain = parsed()
    for keys in nothing:
        config = parsed(**keys)
        assert config.rank_of(PATH) == plain.rank_of(PATH)
        assert config.scale_of(PATH) == plain.scale_of(PATH)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", "yes"),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("layer_replication", [[0, 4]]),
        ("trainable_token_indices", [1, 2]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("kasa_config", {"beta": 1e-4}),
        ("monteclora_config", {"num_samples": 2}),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "loftq"),
        ("r", 0),
        ("r", 1 << 20),
        ("r", "8"),
        ("r", True),
        ("lora_alpha", float("nan")),
        ("lora_alpha", "much"),
        ("lora_alpha", 10**400),
        ("alpha_pattern", {"q_proj": -(10**400)}),
        ("rank_pattern", {f"q{n}": 4 for n in range(1001)}),
        ("target_modules", []),
        ("target_modules", [3]),
        ("target_modules", {"q": 1}),
        ("target_modules", "(unclosed"),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": None}),
        ("layers_to_transform", ["1"]),
        ("fan_in_fan_out", "yes"),
        ("exclude_modules", "x" * 1000),
    ],
)
def test_what_cannot_be_applied_is_refused_by_its_key(key, value):
    with pytest.raises(ModelLoadFailed, match=rf"^adapter_config\.json: {key}\b"):
        parsed(**{key: value})


def test_a_pattern_with_layers_is_refused():
    with pytest.raises(ModelLoadFailed, match="layers_to_transform"):
        parsed(target_modules=r".*q_proj", layers_to_transform=[1])


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a|a)+$",
        r"(.*a){20}",
        ".*.*a*" * 60 + "X",
        ".?" * 200 + "X",
        "(.|.)" * 90 + "X",
        "((.*.)*.?)*X",
    ],
)
def test_no_pattern_takes_long(pattern):
    began = time.thread_time()
    assert not parsed(target_modules=pattern).targets_layer(PATH)
    assert parsed(rank_pattern={pattern: 5}, r=4).rank_of(PATH) == 4
    assert time.thread_time() - began < 5


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(?i)q_proj", "flags"),
        ("(?x)q_proj #", "flags"),
        ("(?i:q)_proj", "subpattern"),
        (r"(.*)\.\1", "groupref"),
        ("(?=.*q).*", "assert"),
        ("(?#[)a{99999999999999999999}(?#])", "too large"),
        ("(((a*b)*c)*d)*", "inside each other"),
        ("a" * 501, "500 characters"),
    ],
)
@pytest.mark.parametrize("key", ["target_modules", "rank_pattern", "layers_pattern"])
def test_a_pattern_that_is_not_read_is_refused_with_the_reason(key, pattern, reason):
    value = {pattern: 4} if key == "rank_pattern" else pattern
    with pytest.raises(ModelLoadFailed, match=rf"(?s){key} .*{reason}"):
        parsed(**{key: value})
