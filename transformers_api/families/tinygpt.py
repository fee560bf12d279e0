"""TinyGPT and TinyGPT-MoE: learned positions, LayerNorm, ReLU or a mixture of SwiGLU experts."""

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
)


class TinyGPTConfig(DecoderConfig):
    """``num_experts`` 0 is the dense model, whose feed-forward part is one ReLU network.

    Beyond its window the original reads the last ``max_position_embeddings`` tokens again for each
    new one, from position 0.
    """

    model_type = "tinygpt"
    num_experts: int = 0
    num_experts_per_tok: int = 2
    context_overflow: str | None = "slide"


class Router(nn.Module):
    """The few experts with the largest logits, weighted by their softmax.

    What it returns is what transformers' routers return, for those who watch them.
    """

    def __init__(self, per_token: int) -> None:
        super().__init__()
        self.per_token = per_token

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, E), weights (N, k) and experts (N, k) of N tokens."""
        best, chosen = logits.topk(self.per_token)
        return logits, best.softmax(dim=-1), chosen


class Experts(nn.Module):
    """Each token goes to a few experts."""

    def __init__(self, config: TinyGPTConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate = nn.Linear(width, config.num_experts, bias=False)
        self.router = Router(config.num_experts_per_tok)
        self.experts = nn.ModuleList(
            SwiGLU(width, hidden, bias=False) for _ in range(config.num_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        tokens = x.flatten(0, -2)
        _, shares, chosen = self.router(self.gate(tokens))  # (B*T, k) each
        y = torch.zeros_like(tokens)
        for index in chosen.unique().tolist():
            rows, place = (chosen == index).nonzero(as_tuple=True)
            y.index_add_(0, rows, self.experts[index](tokens[rows]) * shares[rows, place, None])
        return y.view_as(x)


class TinyGPTModel(DecoderModel):
    """The decoder of TinyGPT. The rotary embedding that the original MoE builds is never used."""

    config: TinyGPTConfig

    def __init__(self, config: TinyGPTConfig) -> None:
        super().__init__(config)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(
                Attention(config, index, bias=True),
                Experts(config) if config.num_experts else feed_forward(config, nn.ReLU()),
                nn.LayerNorm,
            )
            for index in range(config.num_hidden_layers)
        )
        self.ln_f = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def place(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Rotation | None]:
        """See DecoderModel."""
        return x + self.position_embedding(positions), None


class TinyGPTForCausalLM(DecoderForCausalLM):
    """TinyGPT with its head."""

    config: TinyGPTConfig
    decoder = TinyGPTModel
