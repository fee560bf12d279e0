"""niels-gpt: the byte model (version 1) and the SentencePiece model (version 2)."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from transformers_api.families.decoder import (
    Attention,
    Block,
    DecoderConfig,
    DecoderForCausalLM,
    DecoderModel,
    Rotation,
    SwiGLU,
    feed_forward,
    rotation_at,
)

NORMS: dict[int, Callable[[int], nn.Module]] = {
    1: nn.LayerNorm,
    2: functools.partial(nn.RMSNorm, eps=1e-5),
}


class NielsConfig(DecoderConfig):
    """``version`` 1 has LayerNorm and GELU, 2 has RMSNorm and SwiGLU.

    Both read the last ``max_position_embeddings`` tokens again for each new one, and draw it with
    one torch.multinomial from a generator that the seed alone decides.
    """

    model_type = "niels_gpt"
    version: int = 1
    vocab_size: int = 256
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    max_position_embeddings: int = 256
    rope_theta: float = 10000.0
    context_overflow: str | None = "slide"
    sampling_noise: str | None = "torch"


class NielsModel(DecoderModel):
    """The decoder of niels-gpt."""

    config: NielsConfig

    def __init__(self, config: NielsConfig) -> None:
        super().__init__(config)
        norm = NORMS[config.version]
        self.blocks = nn.ModuleList(
            Block(Attention(config, index, bias=False), self._feed_forward(config), norm)
            for index in range(config.num_hidden_layers)
        )
        self.ln_f = norm(config.hidden_size)
        self.post_init()

    @staticmethod
    def _feed_forward(config: NielsConfig) -> nn.Module:
        if config.version == 1:
            return feed_forward(config, nn.GELU())
        return SwiGLU(config.hidden_size, config.intermediate_size, bias=True)

    def place(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Rotation | None]:
        """See DecoderModel."""
        return x, rotation_at(positions, self.config, self.config.rope_theta, torch.float64)


class NielsForCausalLM(DecoderForCausalLM):
    """niels-gpt with its head."""

    config: NielsConfig
    decoder = NielsModel
