"""A pre-norm decoder with a tied head: what all families have in common.

A family is a configuration, an embedding and a choice of parts. Attention goes through
transformers' attention interface, K and V through its cache, positions are given or counted, and a
4-D mask is taken as it is: batching, inspection and ``generate`` see a model like any other.

Annotations are evaluated in this package: transformers reads from ``config: X`` of a model class
which configuration is its own.

Letters for shapes: B sequences, T new tokens, S cached tokens, V vocabulary, C width, H heads,
G heads of K and V, D head size.
"""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}
Rotation = tuple[Tensor, Tensor]  # cos and sin of the positions: (B, 1, T, D/2) each


class DecoderConfig(PreTrainedConfig):
    """The sizes that every family has, by transformers' names.

    ``context_overflow``, ``prompt_window`` and ``sampling_noise`` tell an engine what the original
    system does: see the families that set them.
    """

    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 50304
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 512
    layer_types: list[str] | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    context_overflow: str | None = None
    prompt_window: int | None = None
    sampling_noise: str | None = None


class Attention(nn.Module):
    """Causal self-attention; queries may share heads of K and V, and may be rotated."""

    def __init__(self, config: DecoderConfig, layer_idx: int, *, bias: bool) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        kv_heads = config.num_key_value_heads or config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // kv_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.sizes = [config.hidden_size, kv_heads * self.head_dim, kv_heads * self.head_dim]
        self.qkv = nn.Linear(config.hidden_size, sum(self.sizes), bias=bias)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=bias)

    def forward(
        self, x: Tensor, mask: Any, cache: Any, rotation: Rotation | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``x`` (B, T, C) attended (B, T, C), and the weights (B, H, T, S) where they are known."""
        heads = [
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.qkv(x).split(self.sizes, dim=-1)
        ]
        q, k, v = heads
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        y, weights = attend(self, q, k, v, mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.out_proj(y.flatten(2)), weights


def eager_attention(
    module: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, for who wants to see the weights. Signature: transformers'."""
    key, value = (
        each.repeat_interleave(module.num_key_value_groups, dim=1) for each in (key, value)
    )
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) to (…, C)."""
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


def feed_forward(config: DecoderConfig, activation: nn.Module) -> nn.Sequential:
    """Linear, activation, Linear, with biases."""
    return nn.Sequential(
        nn.Linear(config.hidden_size, config.intermediate_size),
        activation,
        nn.Linear(config.intermediate_size, config.hidden_size),
    )


class Block(nn.Module):
    """x + attention of the normed x, then the same with the feed-forward part."""

    def __init__(self, attn: Attention, ffwd: nn.Module, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.ln1 = norm(attn.config.hidden_size)
        self.attn = attn
        self.ln2 = norm(attn.config.hidden_size)
        self.ffwd = ffwd

    def forward(
        self, x: Tensor, mask: Any, cache: Any, rotation: Rotation | None, **kwargs: Any
    ) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = x + self.attn(self.ln1(x), mask, cache, rotation, **kwargs)[0]
        return cast(Tensor, x + self.ffwd(self.ln2(x)))


class DecoderPreTrainedModel(PreTrainedModel):
    """The attributes that transformers asks of every model class."""

    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": Block,
        "attentions": Attention,
    }
    _input_embed_layer = "token_embedding"


class DecoderModel(DecoderPreTrainedModel):
    """Token ids to hidden states. Subclasses add ``blocks``, ``ln_f`` and what tells positions."""

    config: DecoderConfig
    blocks: nn.ModuleList
    ln_f: nn.Module

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.kinds = config.layer_types or ["full_attention"] * config.num_hidden_layers

    def place(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Rotation | None]:
        """``x`` (B, T, C) knowing its ``positions`` (B, T), and what rotates queries and keys."""
        raise NotImplementedError

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Ids or embeddings (B, T) to hidden states (B, T, C)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        x = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + x.shape[1], device=x.device)[None]
        masks = self._masks(x, attention_mask, past_key_values, position_ids)
        x, rotation = self.place(x, position_ids)
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            x = block(x, masks[kind], past_key_values, rotation, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(x), past_key_values=past_key_values
        )

    def _masks(self, x: Tensor, mask: Any, cache: Any, positions: Tensor) -> dict[str, Any]:
        """A mask for each kind of layer; one already made, or a dict of them, stays as it is."""
        if isinstance(mask, dict):
            return mask
        return {
            kind: MASKS[kind](
                config=self.config,
                inputs_embeds=x,
                attention_mask=mask,
                past_key_values=cache,
                position_ids=positions,
            )
            for kind in set(self.kinds)
        }


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """A DecoderModel and its head, which is the token embedding again."""

    _tied_weights_keys = {"lm_head.weight": "model.token_embedding.weight"}
    decoder: ClassVar[type[DecoderModel]]

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = self.decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), or of the last ``logits_to_keep`` tokens."""
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            logits=self.lm_head(output.last_hidden_state[:, keep]),
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotary embedding of ``x`` (B, H, T, D), by neighbours: dimensions 2i and 2i+1 are a pair."""
    cos, sin = rotation
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def rotation_at(
    positions: Tensor, config: DecoderConfig, theta: float, dtype: torch.dtype
) -> Rotation:
    """Cosines and sines for ``rotated`` at ``positions`` (B, T), of angles in ``dtype``."""
    head_dim = config.hidden_size // config.num_attention_heads
    length = config.max_position_embeddings
    cos, sin = _table(length, head_dim, theta, dtype, positions.device)
    return cos[positions][:, None], sin[positions][:, None]


@functools.lru_cache(maxsize=16)
def _table(
    length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> Rotation:
    """Cos and sin (length, D/2) in float32. Made on the CPU: not every device has float64."""
    with torch.inference_mode(False), torch.device("cpu"):
        powers = torch.arange(0, head_dim, 2, dtype=dtype) / head_dim
        angles = torch.outer(torch.arange(length, dtype=dtype), 1.0 / theta**powers)
        return angles.cos().float().to(device), angles.sin().float().to(device)
