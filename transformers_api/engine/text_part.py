"""The causal language model inside a model that also sees or hears (``ForConditionalGeneration``).

Its configuration is the section for text, its class that of transformers for such a section. Where
transformers has only the layers, a head is put on them.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from transformers_api.errors import ModelNotServable

# Wrappers whose logits are not scaled as those of their text models are.
_UNSCALED = frozenset({"aya_vision", "cohere2_vision"})


def causal_model(config: Any) -> tuple[Any, Any]:
    """The class that makes a causal language model of ``config``, and the configuration for it.

    Of a model with towers it is the language part alone. Raises ModelNotServable where there is
    none that can be had alone.
    """
    text = _section(config)
    if text is None:
        return AutoModelForCausalLM, config
    kinds: tuple[Any, Any] = type(config), type(text)
    made = _class_for(*kinds)
    if made is None:
        raise ModelNotServable(
            f"The language part of a {config.model_type} model ({text.model_type}) cannot be "
            "served alone",
            param="model",
        )
    return made, _inheriting(config, text)


def has_language_part(config: Any) -> bool:
    """True where ``causal_model`` takes a part of the model."""
    return _section(config) is not None


def _section(config: Any) -> Any:
    for name in ("text_config", "thinker_config"):
        section = getattr(config, name, None)
        if isinstance(section, PreTrainedConfig) and section is not config:
            return _section(section) or section
    return None


def _inheriting(config: Any, text: Any) -> Any:
    """``text`` with what the whole model's configuration decides."""
    tied = getattr(text, "tie_word_embeddings", False)
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", tied)
    for name in ("eos_token_id", "dtype", "quantization_config"):
        if (value := getattr(config, name, None)) is not None:
            setattr(text, name, value)
    if config.model_type in _UNSCALED:
        text.logit_scale = 1.0
    text.name_or_path = config.name_or_path
    return text


@functools.cache
def _class_for(kind: type, text_kind: type) -> Any:
    for each in (text_kind, kind):
        if each in MODEL_FOR_CAUSAL_LM_MAPPING:
            made: Any = MODEL_FOR_CAUSAL_LM_MAPPING[each]
            if made.config_class is text_kind:
                return made
    layers = MODEL_MAPPING[text_kind] if text_kind in MODEL_MAPPING else _unlisted(text_kind)
    return None if layers is None else _with_head(text_kind, layers)


def _unlisted(text_kind: Any) -> Any:
    """The layers for a section that no Auto class knows, as Qwen's Omni models have one.

    Only those with a rope: sections of older models are of encoders, or of decoders for an image.
    """
    if not hasattr(text_kind, "rope_parameters"):
        return None
    name = text_kind.__module__.replace(".configuration_", ".modeling_")
    try:
        classes = vars(importlib.import_module(name)).values()
    except ImportError:  # of a package that it needs
        return None
    return next(
        (
            each
            for each in classes
            if isinstance(each, type)
            and issubclass(each, PreTrainedModel)
            and each.__name__.endswith("TextModel")
            and each.config_class is text_kind
        ),
        None,
    )


def _with_head(text_kind: Any, layers: Any) -> Any:
    """A class for layers that transformers knows without a head."""
    base = next(each for each in layers.__mro__[1:] if issubclass(each, PreTrainedModel))
    fields = {
        "layers_class": layers,
        "config_class": text_kind,
        "base_model_prefix": "model",
        "_tied_weights_keys": {"lm_head.weight": "model.embed_tokens.weight"},
    }
    return type(f"{layers.__name__}WithHead", (_Headed, base, GenerationMixin), fields)


class _Headed:
    """Layers and a head, as every ``ForCausalLM`` of transformers; beside a PreTrainedModel."""

    layers_class: Any
    model: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.model = self.layers_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]

    def get_input_embeddings(self) -> Any:
        """See PreTrainedModel."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """See PreTrainedModel."""
        return self.lm_head

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Any = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), as every ForCausalLM; of the last ``logits_to_keep`` tokens, 0: all."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **options,
        )
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            logits=self.lm_head(output.last_hidden_state[:, last]),
            past_key_values=output.past_key_values,
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )
