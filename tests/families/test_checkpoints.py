"""Original files into standard folders: every shape of file, strict, once into the store."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.families.originals import ORIGINALS
from tests.repeats import slow
from transformers_api.checkpoints.convert import convert
from transformers_api.checkpoints.formats import FAMILIES
from transformers_api.checkpoints.read import read_checkpoint
from transformers_api.cli import main
from transformers_api.config.settings import Settings
from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models import preflight
from transformers_api.serving.models.spec import ModelSpec, PathSource
from transformers_api.serving.models.store import ModelStore

ROOT = Path(__file__).parents[2]
# a weight of each, by the original's name
SOME_WEIGHT = {
    "tinygpt": "blocks.1.attn.in_proj_bias",
    "tinygpt-moe": "blocks.1.moe.experts.3.down_proj.weight",
    "tinygpt2": "blocks.1.attn.k_proj.weight",
    "niels-v1": "blocks.0.mlp.fc2.bias",
    "niels-v2": "blocks.1.mlp.fc_g.weight",
    "gpt3dev": "transformer.h.1.mlp.c_fc.weight",
}


def quiet(share: float, what: str) -> None:
    pass


def plain_state(name: str) -> dict[str, torch.Tensor]:
    """The weights of a fixture, bare and by their plain names."""
    if name == "gpt3dev":
        return load_file(ORIGINALS[name].checkpoint / "model.safetensors")
    loaded = torch.load(ORIGINALS[name].checkpoint, weights_only=True)
    state = loaded.get("model_state_dict", loaded.get("model_state", loaded))
    return {
        key.replace("_orig_mod.", "").replace("swiglu.", ""): value for key, value in state.items()
    }


def saved(folder: Path, content: object, name: str, config: bool = True) -> Path:
    """A checkpoint file, with the fixture's configuration beside it."""
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / "model.pt")
    if config:
        shutil.copy(ORIGINALS[name].folder / "config.json", folder)
    if name == "niels-v2":
        tokenizer = ORIGINALS[name].folder.parent / "tokenizer/spm.model"
        shutil.copy(tokenizer, folder)
    return folder / "model.pt"


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_family_is_recognised_from_the_weights(name):
    assert read_checkpoint(ORIGINALS[name].checkpoint).family.name == ORIGINALS[name].family


@pytest.mark.parametrize("prefix", ["", *slow("_orig_mod.", "module."), "module._orig_mod."])
@pytest.mark.parametrize("wrapper", [None, *slow("model_state_dict", "model_state"), "model"])
def test_bare_and_wrapped_weights_give_the_same_model(tmp_path, prefix, wrapper):
    expected = read_checkpoint(ORIGINALS["tinygpt-moe"].checkpoint)
    state = {prefix + key: value for key, value in plain_state("tinygpt-moe").items()}
    content = {wrapper: state, "epoch": 3} if wrapper else state
    found = read_checkpoint(saved(tmp_path, content, "tinygpt-moe"))
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.weights.keys() == expected.weights.keys()
    assert all(torch.equal(found.weights[key], expected.weights[key]) for key in found.weights)


@pytest.mark.parametrize("name", SOME_WEIGHT)
def test_a_missing_weight_is_named_as_the_original_names_it(tmp_path, name):
    state = plain_state(name)
    del state[SOME_WEIGHT[name]]
    with pytest.raises(ModelLoadFailed, match=rf"missing: {SOME_WEIGHT[name]}$"):
        read_checkpoint(saved(tmp_path, state, name))


@pytest.mark.parametrize("name", SOME_WEIGHT)
def test_every_weight_is_needed(tmp_path, name):
    state = plain_state(name)
    needed = {key for key, weight in state.items() if not weight.is_complex()} - {"lm_head.weight"}
    for key in needed:
        rest = {other: value for other, value in state.items() if other != key}
        path = saved(tmp_path, rest, name)
        with pytest.raises(ModelLoadFailed):
            read_checkpoint(path, ORIGINALS[name].family)


@pytest.mark.parametrize("name", SOME_WEIGHT)
def test_a_weight_too_many_is_named(tmp_path, name):
    state = plain_state(name) | {"blocks.0.moe.noise.weight": torch.ones(3)}
    with pytest.raises(ModelLoadFailed, match=r"not expected: blocks\.0\.moe\.noise\.weight"):
        read_checkpoint(saved(tmp_path, state, name))


def test_a_weight_of_another_shape_is_named(tmp_path):
    state = plain_state("tinygpt") | {"ln_f.weight": torch.ones(3)}
    with pytest.raises(ModelLoadFailed, match=r"ln_f\.weight has the shape \[3\], .* says \[64\]"):
        read_checkpoint(saved(tmp_path, state, "tinygpt"))


def test_a_tied_head_may_be_dropped_but_not_differ(tmp_path):
    state = plain_state("tinygpt")
    without = {key: value for key, value in state.items() if key != "lm_head.weight"}
    assert read_checkpoint(saved(tmp_path, without, "tinygpt")).parameters > 0
    other = state | {"lm_head.weight": state["lm_head.weight"] + 1}
    with pytest.raises(ModelLoadFailed, match=r"lm_head\.weight is not token_embedding_table"):
        read_checkpoint(saved(tmp_path, other, "tinygpt"))


def test_complex_buffers_are_left_out(tmp_path):
    state = plain_state("tinygpt2")
    assert state["freqs_cis"].is_complex()
    assert not [
        key for key in read_checkpoint(ORIGINALS["tinygpt2"].checkpoint).weights if "cis" in key
    ]


def test_heads_that_nobody_says_are_asked_for(tmp_path):
    path = saved(tmp_path, plain_state("tinygpt"), "tinygpt", config=False)
    with pytest.raises(ModelLoadFailed, match=r"n_head cannot be read .* --config FILE"):
        read_checkpoint(path)
    (tmp_path / "own.json").write_text('{"n_head": 4}')
    config = read_checkpoint(path, config_file=tmp_path / "own.json").config
    assert (config.num_attention_heads, config.vocab_size) == (4, 512)


@pytest.mark.parametrize(
    ("width", "layers", "experts", "heads"),
    [
        pytest.param(512, 8, 0, 8, id="51M"),
        pytest.param(512, 8, 4, 8, id="moe 85M"),
        pytest.param(512, 8, 8, 16, id="wikipedia moe"),
    ],
)
def test_published_sizes_need_no_configuration(width, layers, experts, heads):
    from transformers_api.families import TinyGPTConfig, TinyGPTForCausalLM

    name = "tinygpt-moe" if experts else "tinygpt"
    family = next(family for family in FAMILIES if family.name == name)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_experts": experts}
    config = TinyGPTConfig(**sizes, num_attention_heads=heads, intermediate_size=2 * width)
    with torch.device("meta"):
        ours = TinyGPTForCausalLM(config).state_dict()
    state = {family.original_names(key)[0]: weight for key, weight in ours.items()}
    found = family.configure(state, {})
    assert found.num_attention_heads == heads
    assert found.num_experts == experts
    assert (found.vocab_size, found.max_position_embeddings, found.eos_token_id) == (
        50304,
        512,
        50256,
    )


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("tinygpt", {"n_head": 4, "n_layer": 3}, "says n_layer 3, the weights have 2"),
        ("tinygpt", {"n_head": 5}, "n_head 5 does not divide the width 64"),
        ("tinygpt2", {"n_head": 4, "gqa_kv_head": 4}, "says gqa_kv_head 4, the weights have 2"),
        ("niels-v1", {"H": 4}, "T, the context, cannot be read"),
        ("niels-v1", {"T": 64}, "H cannot be read"),
        ("gpt3dev", {"n_head": 4, "use_pre_layernorm": False}, "use_pre_layernorm false"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, name, given, message):
    (tmp_path / "own.json").write_text(json.dumps(given))
    with pytest.raises(ModelLoadFailed, match=message):
        read_checkpoint(ORIGINALS[name].checkpoint, config_file=tmp_path / "own.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param({"a": torch.ones(2)}, "of no known family", id="other weights"),
        pytest.param({}, "holds no dict of weights", id="empty"),
        pytest.param([1, 2], "holds no dict of weights", id="a list"),
        pytest.param({"model": {"a": "text"}}, "holds no dict of weights", id="text"),
        pytest.param({"a": Path("x")}, "cannot be read as plain weights", id="an object"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content, message):
    with pytest.raises(ModelLoadFailed, match=message):
        read_checkpoint(saved(tmp_path, content, "tinygpt"))


def test_a_wrong_family_is_named():
    path = ORIGINALS["tinygpt"].checkpoint
    with pytest.raises(ModelLoadFailed, match="of the family tinygpt, not niels-v1"):
        read_checkpoint(path, "niels-v1")
    with pytest.raises(ModelLoadFailed, match="'x' is not a family: expected one of tinygpt, "):
        read_checkpoint(path, "x")


def test_stock_gpt2_is_not_taken_for_gpt3dev(tmp_path):
    state = plain_state("gpt3dev")
    key = "transformer.h.0.attn.c_attn.weight"
    with pytest.raises(ModelLoadFailed, match="of no known family"):
        read_checkpoint(saved(tmp_path, state | {key: state[key].T.contiguous()}, "gpt3dev"))


def test_a_banded_gpt3dev_becomes_a_class_of_ours(tmp_path):
    from transformers import AutoModelForCausalLM

    source = tmp_path / "source"
    shutil.copytree(ORIGINALS["gpt3dev"].folder, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"window_size": 8}))
    convert(source, tmp_path / "made", quiet)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    assert type(model).__name__ == "GPT3DevForCausalLM"
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert model.config.sliding_window == 9
    recorded = ORIGINALS["gpt3dev"].recorded
    with torch.inference_mode():
        logits = model(recorded["input_ids"]).logits
    # a token that sees no further back than the band gets what the dense model gives
    torch.testing.assert_close(logits[:, :9], recorded["logits"][:, :9], rtol=0, atol=1e-5)
    assert not torch.allclose(logits[:, 20:], recorded["logits"][:, 20:], atol=1e-3)


def test_tied_weights_are_stored_once(converted):
    files = preflight.inspect_folder(converted("tinygpt"))
    state = plain_state("tinygpt")
    expected = sum(weight.numel() for key, weight in state.items() if key != "lm_head.weight")
    assert (files.parameters, files.stored_dtype) == (expected, "float32")


@pytest.mark.parametrize("name", ["tinygpt", *slow("gpt3dev")])
def test_the_registry_converts_an_original_once_into_the_store(tmp_path, name):
    store = ModelStore(Settings(model_store=tmp_path / "store", hf_home=tmp_path / "hf"))
    spec = ModelSpec(name="m", source=PathSource(ORIGINALS[name].checkpoint))
    assert store.locate(spec) is None
    heard: list[str] = []
    files = store.prepare(spec, lambda share, what: heard.append(what))
    assert "writing" in heard
    assert files.folder.parent == tmp_path / "store"
    assert store.locate(spec) == files.folder
    heard.clear()
    assert store.prepare(spec, lambda share, what: heard.append(what)) == files
    assert heard == ["ready"]


def test_what_is_wrong_with_an_original_reaches_the_registry(tmp_path):
    store = ModelStore(Settings(model_store=tmp_path / "store", hf_home=tmp_path / "hf"))
    state = plain_state("tinygpt")
    del state["ln_f.bias"]
    path = saved(tmp_path / "source", state, "tinygpt")
    with pytest.raises(ModelLoadFailed, match=r"could not be converted: .*missing: ln_f\.bias"):
        store.prepare(ModelSpec(name="m", source=PathSource(path)), quiet)
    assert not [each for each in (tmp_path / "store").iterdir() if each.is_dir()]


def test_tinygpt2_as_a_folder_of_the_hub_is_converted_too(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    state = plain_state("tinygpt2")
    kept = {
        key: value for key, value in state.items() if key not in ("freqs_cis", "lm_head.weight")
    }
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((ORIGINALS["tinygpt2"].folder / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "tinygpt2"}))
    assert preflight.is_original(source)
    convert(source, tmp_path / "made", quiet)
    assert not preflight.is_original(tmp_path / "made")
    made, expected = load_file(tmp_path / "made/model.safetensors"), read_checkpoint(source).weights
    assert all(torch.equal(made[key], expected[key]) for key in expected)


def test_the_store_knows_the_model_types_of_ours():
    from transformers_api.families import FAMILIES as OURS

    assert {config.model_type for config, _, _ in OURS} == preflight.OWN_TYPES


@pytest.mark.slow  # the registry runs the same program, above
def test_convert_command_makes_a_folder_that_the_auto_classes_load(tmp_path):
    dest = tmp_path / "made"
    source = ORIGINALS["niels-v1"].checkpoint
    command = [sys.executable, "-m", "transformers_api", "convert", str(source), str(dest)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"best.pt is ready in {dest}\n"
    program = (
        "import sys, transformers_api.families\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(type(model).__name__, tokenizer.encode('hi'))\n"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program, str(dest)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert loaded.stdout == "NielsForCausalLM [104, 105]\n", loaded.stderr


def test_convert_command_takes_family_and_configuration(tmp_path, capsys):
    path = saved(tmp_path, plain_state("tinygpt"), "tinygpt", config=False)
    (tmp_path / "own.json").write_text('{"n_head": 4}')
    arguments = ["convert", str(path), str(tmp_path / "made"), "--family", "tinygpt"]
    assert main(arguments) == 1
    assert "n_head cannot be read" in capsys.readouterr().err
    assert main([*arguments, "--config", str(tmp_path / "own.json")]) == 0
    assert (tmp_path / "made/tokenizer.json").is_file()
    assert main([*arguments, "--config", str(tmp_path / "own.json")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "none.pt"), str(tmp_path / "other")]) == 1
    assert "does not exist" in capsys.readouterr().err
