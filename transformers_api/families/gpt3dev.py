"""GPT3-dev, second version: GPT-2 whose odd layers see a band. The first version is plain GPT-2."""

from torch import Tensor, nn

from transformers_api.families.decoder import (
    Attention,
    Block,
    DecoderConfig,
    DecoderForCausalLM,
    DecoderModel,
    Rotation,
    feed_forward,
)


class GPT3DevConfig(DecoderConfig):
    """``sliding_window`` counts the token itself: the original's ``window_size`` + 1."""

    model_type = "gpt3dev"
    vocab_size: int = 50257
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 2048
    sliding_window: int = 257

    def __post_init__(self, **kwargs: object) -> None:
        if self.layer_types is None:
            kinds = ("full_attention", "sliding_attention")
            self.layer_types = [kinds[index % 2] for index in range(self.num_hidden_layers)]
        super().__post_init__(**kwargs)


class GPT3DevModel(DecoderModel):
    """The decoder of GPT3-dev's second version."""

    config: GPT3DevConfig

    def __init__(self, config: GPT3DevConfig) -> None:
        super().__init__(config)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(
            Block(
                Attention(config, index, bias=True), feed_forward(config, nn.GELU()), nn.LayerNorm
            )
            for index in range(config.num_hidden_layers)
        )
        self.ln_f = nn.LayerNorm(config.hidden_size)
        self.post_init()

    def place(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Rotation | None]:
        """See DecoderModel."""
        return x + self.position_embedding(positions), None


class GPT3DevForCausalLM(DecoderForCausalLM):
    """GPT3-dev's second version with its head."""

    config: GPT3DevConfig
    decoder = GPT3DevModel
