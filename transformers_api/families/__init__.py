"""Architectures of our own, registered with transformers' Auto classes. Start: ``decoder.py``.

TinyGPT (dense and mixture of experts), TinyGPT2, niels-gpt and GPT3-dev's banded second version
are what ``decoder.py`` builds from the parts that their configurations choose. Importing this
package is enough: ``AutoModelForCausalLM`` then loads a converted folder of theirs.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from transformers_api.families.decoder import DecoderConfig, DecoderForCausalLM, DecoderModel
from transformers_api.families.gpt3dev import GPT3DevConfig, GPT3DevForCausalLM, GPT3DevModel
from transformers_api.families.niels import NielsConfig, NielsForCausalLM, NielsModel
from transformers_api.families.tinygpt import TinyGPTConfig, TinyGPTForCausalLM, TinyGPTModel
from transformers_api.families.tinygpt2 import TinyGPT2Config, TinyGPT2ForCausalLM, TinyGPT2Model

FAMILIES: tuple[tuple[type[DecoderConfig], type[DecoderModel], type[DecoderForCausalLM]], ...] = (
    (TinyGPTConfig, TinyGPTModel, TinyGPTForCausalLM),
    (TinyGPT2Config, TinyGPT2Model, TinyGPT2ForCausalLM),
    (NielsConfig, NielsModel, NielsForCausalLM),
    (GPT3DevConfig, GPT3DevModel, GPT3DevForCausalLM),
)


def register() -> None:
    """Make the families known to AutoConfig, AutoModel and AutoModelForCausalLM. Idempotent."""
    for config, model, causal_lm in FAMILIES:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)


register()
