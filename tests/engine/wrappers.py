"""Tiny random models that see or hear besides, one of each family, and their folders."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file

from tests.engine.models import IDS, MIXED, SIZES

TEXT = {**SIZES, **IDS, "num_hidden_layers": 2}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_TOWER = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
TOKENS = {"image_token_id": 95, "video_token_id": 94}
QWEN_TOKENS = {**TOKENS, "vision_start_token_id": 93, "vision_end_token_id": 92}


def _text(kind: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": kind, **TEXT, **changes}


def _siglip() -> dict[str, Any]:
    return {"model_type": "siglip_vision_model", **TOWER}


def _clip() -> dict[str, Any]:
    return {"model_type": "clip_vision_model", **TOWER, "projection_dim": 16}


def _audio() -> dict[str, Any]:
    return {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}


FAMILIES = {
    "gemma3": lambda: tf.Gemma3Config(
        text_config=_text("gemma3_text", **{**MIXED, "layer_types": MIXED["layer_types"][:2]})
        | {"head_dim": 8},
        vision_config=_siglip(),
        mm_tokens_per_image=4,
        image_token_index=95,
    ),
    "qwen2-vl": lambda: tf.Qwen2VLConfig(
        text_config=_text("qwen2_vl_text", rope_parameters=MROPE),
        vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32},
        tie_word_embeddings=True,
        **QWEN_TOKENS,
    ),
    "qwen2.5-vl": lambda: tf.Qwen2_5_VLConfig(
        text_config=_text("qwen2_5_vl_text", rope_parameters=MROPE),
        vision_config={**QWEN_TOWER, "out_hidden_size": 32, "fullatt_block_indexes": [0]},
        **QWEN_TOKENS,
    ),
    "qwen3-vl": lambda: tf.Qwen3VLConfig(
        text_config=_text("qwen3_vl_text", head_dim=8, rope_parameters=MROPE),
        vision_config={
            **QWEN_TOWER,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        tie_word_embeddings=True,
        **QWEN_TOKENS,
    ),
    "mistral3": lambda: tf.Mistral3Config(
        text_config=_text("mistral", head_dim=8),
        vision_config={"model_type": "pixtral", **TOWER, "head_dim": 8},
        image_token_index=95,
        tie_word_embeddings=False,
    ),
    "llava": lambda: tf.LlavaConfig(
        text_config=_text("llama"), vision_config=_clip(), image_token_index=95
    ),
    "idefics3": lambda: tf.Idefics3Config(
        text_config=_text("llama"), vision_config=TOWER, image_token_id=95
    ),
    "smolvlm": lambda: tf.SmolVLMConfig(
        text_config=_text("llama"), vision_config=TOWER, image_token_id=95, tie_word_embeddings=True
    ),
    "internvl": lambda: tf.InternVLConfig(
        text_config=_text("qwen2"),
        vision_config={**TOWER, "image_size": [8, 8], "patch_size": [4, 4]},
        image_token_id=95,
        tie_word_embeddings=False,
    ),
    "aya-vision": lambda: tf.AyaVisionConfig(
        text_config=_text("cohere2", logit_scale=0.25),
        vision_config=_siglip(),
        image_token_index=95,
    ),
    "llama4": lambda: tf.Llama4Config(
        text_config=_text("llama4_text", head_dim=8, num_local_experts=2, intermediate_size_mlp=64),
        vision_config={
            **TOWER,
            "vision_output_dim": 16,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
        },
        image_token_index=95,
    ),
    "mllama": lambda: tf.MllamaConfig(
        text_config={
            **_text("mllama_text_model"),
            "vocab_size": 104,
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            **TOWER,
            "num_global_layers": 1,
            "vision_output_dim": 16,
            "attention_heads": 2,
            "intermediate_layers_indices": [0],
        },
        image_token_index=95,
    ),
    "voxtral": lambda: tf.VoxtralConfig(
        text_config=_text("llama"),
        audio_config={**_audio(), "model_type": "voxtral_encoder"},
        audio_token_id=95,
    ),
    "qwen2-audio": lambda: tf.Qwen2AudioConfig(
        text_config=_text("qwen2"), audio_config=_audio(), audio_token_index=95
    ),
}


@functools.cache
def wrapper(name: str) -> Any:
    """The whole model, in evaluation mode."""
    torch.manual_seed(sum(map(ord, name)))
    config = FAMILIES[name]()
    kind = type(config).__name__.removesuffix("Config") + "ForConditionalGeneration"
    model = getattr(tf, kind)(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.3 / parameter.shape[-1] ** 0.5)
    return model


def save(name: str, folder: Path, *, as_published: bool) -> Any:
    """Save the model ``name``: with the names of its first publication, or with those of today."""
    model = wrapper(name)
    if as_published:
        model.save_pretrained(folder)
        return model
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tied = model.all_tied_weights_keys
    state = {n: t.contiguous() for n, t in model.state_dict().items() if n not in tied}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return model
