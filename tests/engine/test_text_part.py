"""Models that see or hear besides are served by their language part."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from tests.engine.models import generate
from tests.engine.reading import GREEDY, ask, complete
from tests.engine.wrappers import FAMILIES, MROPE, TEXT, save
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.pretrained import load_model
from transformers_api.engine.stored_model import load_stored, stored_weights
from transformers_api.errors import ModelLoadFailed, ModelNotServable
from transformers_api.serving.models.preflight import inspect_folder

PROMPT = [5, 9, 17, 33, 60, 21, 4, 8]


def load(folder):
    return load_model(folder, "cpu", "auto", trust_remote_code=False)


def logits(model):
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def edit(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("as_published", [True, False], ids=["first names", "names of today"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_part_says_what_the_whole_model_says_of_a_text(family, as_published, tmp_path):
    whole = save(family, tmp_path, as_published=as_published)
    part = load(tmp_path)
    torch.testing.assert_close(logits(part), logits(whole), rtol=0, atol=1e-5)
    assert not [n for n, _ in part.named_parameters() if "vision" in n or "audio" in n]


@pytest.mark.parametrize("as_published", [True, False], ids=["first names", "names of today"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_part_streams_from_its_files(family, as_published, tmp_path):
    whole = save(family, tmp_path, as_published=as_published)
    stored = stored_weights(tmp_path, trust_remote_code=False)
    part = load_stored(
        tmp_path, stored, torch.float32, lambda model, weights, dtype: weights.fill(model, dtype)
    )
    torch.testing.assert_close(logits(part), logits(whole), rtol=0, atol=1e-5)
    assert sum(stored.types.values()) == sum(p.numel() for p in part.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_of_towers_are_not_counted(family, tmp_path):
    save(family, tmp_path, as_published=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    files = inspect_folder(tmp_path)
    part = load(tmp_path)
    assert files.parameters == sum(p.numel() for p in part.parameters())
    assert files.weight_bytes == 4 * files.parameters


@pytest.mark.parametrize("family", ["gemma3", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "smolvlm"])
def test_a_model_that_sees_is_batched_on_the_kernels(family, tmp_path, engine_thread, native_cache):
    whole = save(family, tmp_path, as_published=True)
    options = LoadOptions(num_slots=2, prefill_chunk=8, native=native_cache, dtype="float32")
    engine = engine_thread.call(lambda: load_engine(tmp_path, options, engine_thread)).result()
    facts = engine.describe()
    assert (facts.kernels, facts.mode) == ("native", "batching")
    asked = [ask(PROMPT[:n], max_tokens=6, **GREEDY) for n in (8, 3)]
    assert complete(engine, *asked) == [generate(whole, PROMPT[:n], 6) for n in (8, 3)]
    engine.close()


def test_a_weight_that_the_language_part_lacks_is_named(tmp_path):
    save("llava", tmp_path, as_published=True)
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    edit(tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(ModelLoadFailed, match=r"missing keys: model\.layers\.1\.mlp\.up_proj"):
        load(tmp_path)


def test_a_weight_that_no_part_has_is_named_where_it_would_be_the_language_parts(tmp_path):
    save("llava", tmp_path, as_published=True)
    edit(tmp_path, lambda w: w.update({"language_model.model.layers.9.extra": torch.zeros(2)}))
    with pytest.raises(ModelLoadFailed, match=r"unexpected keys: .*layers\.9\.extra"):
        load(tmp_path)


def test_ends_of_an_answer_that_only_the_whole_configuration_names_are_taken(
    tmp_path, engine_thread
):
    save("qwen2-vl", tmp_path, as_published=True)
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["text_config"]["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": 77}))
    options = LoadOptions(num_slots=1, native=None)
    engine = engine_thread.call(lambda: load_engine(tmp_path, options, engine_thread)).result()
    assert 77 in engine.eos_token_ids
    engine.close()


def test_a_configuration_without_sections_is_read_as_well(tmp_path):
    """As Qwen2-VL's first ones, whose text fields stand beside vision_config."""
    whole = save("qwen2-vl", tmp_path, as_published=True)
    config = json.loads((tmp_path / "config.json").read_text())
    flat = {**config.pop("text_config"), **config, "model_type": "qwen2_vl"}
    flat["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 1, 1]}
    flat.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps({**flat, "rope_theta": 10000.0}))
    torch.testing.assert_close(logits(load(tmp_path)), logits(whole), rtol=0, atol=1e-5)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert inspect_folder(tmp_path).parameters < sum(p.numel() for p in whole.parameters())


def test_gemma_3n_needs_no_package_for_images(tmp_path):
    text = tf.Gemma3nTextConfig(
        **{**TEXT, "num_hidden_layers": 2, "intermediate_size": [64, 64], "head_dim": 8},
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
        laurel_rank=8,
        activation_sparsity_pattern=[0.0, 0.0],
    )
    torch.manual_seed(0)
    own = tf.Gemma3nForCausalLM(text).float().eval()
    tf.Gemma3nConfig(text_config=text.to_dict()).save_pretrained(tmp_path)
    tied = set(own.all_tied_weights_keys)
    state = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in own.state_dict().items()
        if name not in tied
    }
    state["model.vision_tower.timm_model.conv_stem.conv.weight"] = torch.zeros(4, 3, 3, 3)
    state["model.embed_audio.embedding.weight"] = torch.zeros(8, 8)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(logits(load(tmp_path)), logits(own), rtol=0, atol=1e-5)


def test_a_part_in_a_part_is_served_without_those_beside_it(tmp_path):
    """As of Qwen's Omni models: a thinker, whose text is a part of it, and a talker."""
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
        Qwen2_5OmniThinkerTextModel,
    )

    text = {**TEXT, "rope_parameters": MROPE}
    config = tf.Qwen2_5OmniConfig(thinker_config={"text_config": text})
    torch.manual_seed(0)
    layers = Qwen2_5OmniThinkerTextModel(config.thinker_config.text_config).float().eval()
    head = torch.randn(97, 32)
    config.save_pretrained(tmp_path)
    state = {f"thinker.model.{name}": tensor for name, tensor in layers.state_dict().items()}
    state["thinker.lm_head.weight"] = head
    state["thinker.audio_tower.conv1.weight"] = torch.zeros(4, 4, 3)
    state["talker.model.embed_tokens.weight"] = torch.zeros(9, 8)
    state["token2wav.code2wav_dit_model.x.weight"] = torch.zeros(2)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with torch.inference_mode():
        expected = layers(input_ids=torch.tensor([PROMPT])).last_hidden_state @ head.T
    torch.testing.assert_close(logits(load(tmp_path)), expected, rtol=0, atol=1e-5)


def test_a_model_without_a_language_part_of_its_own_is_refused_by_name(tmp_path):
    tf.BlipConfig().save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelNotServable, match="blip"):
        load(tmp_path)
