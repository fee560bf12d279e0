"""TinyGPT2 and 2.1: rotary positions, shared heads of keys and values, RMSNorm, GELU."""

import functools

import torch
from torch import Tensor, nn

from transformers_api.families.decoder import (
    Attention,
    Block,
    DecoderConfig,
    DecoderForCausalLM,
    DecoderModel,
    Rotation,
    feed_forward,
    rotation_at,
)

RMSNorm = functools.partial(nn.RMSNorm, eps=1e-6)


class TinyGPT2Config(DecoderConfig):
    """``max_position_embeddings`` is what the rotary table has: twice the training window.

    The original cuts a prompt to its last ``prompt_window`` tokens and then goes on to the end of
    the table.
    """

    model_type = "tinygpt2"
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    context_overflow: str | None = "crop"
    prompt_window: int | None = 512


class TinyGPT2Model(DecoderModel):
    """The decoder of TinyGPT2."""

    config: TinyGPT2Config

    def __init__(self, config: TinyGPT2Config) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(
            Block(Attention(config, index, bias=False), feed_forward(config, nn.GELU()), RMSNorm)
            for index in range(config.num_hidden_layers)
        )
        self.ln_f = RMSNorm(config.hidden_size)
        self.post_init()

    def place(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Rotation | None]:
        """See DecoderModel."""
        return x, rotation_at(positions, self.config, self.config.rope_theta, torch.float32)


class TinyGPT2ForCausalLM(DecoderForCausalLM):
    """TinyGPT2 with its head."""

    config: TinyGPT2Config
    decoder = TinyGPT2Model
