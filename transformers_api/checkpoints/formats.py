"""The original checkpoint formats: how each family is recognised, named, sized and tokenized."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from transformers_api.checkpoints.headers.originals import PUBLISHED_HEADS
from transformers_api.errors import ModelLoadFailed
from transformers_api.families.gpt3dev import GPT3DevConfig, GPT3DevForCausalLM
from transformers_api.families.niels import NielsConfig, NielsForCausalLM
from transformers_api.families.tinygpt import TinyGPTConfig, TinyGPTForCausalLM
from transformers_api.families.tinygpt2 import TinyGPT2Config, TinyGPT2ForCausalLM

State = dict[str, Tensor]
Declared = Mapping[str, Any]
END_OF_TEXT = 50256  # GPT-2's


@dataclass(frozen=True, kw_only=True)
class Family:
    """One original format."""

    name: str
    marker: str  # a weight that only this family has
    embedding: str  # the token embedding
    heads: str  # the field of its configuration that the weights cannot tell
    configure: Callable[[State, Declared], Any]  # a PreTrainedConfig
    tokenizer: str  # "gpt2", "bytes", "sentencepiece": see family_tokenizers.make
    names: tuple[tuple[str, str], ...]  # what to write for a part of our name of a weight
    stacked: tuple[str, ...] = ()  # the original's weights that are one of ours: its ``qkv``
    never_sampled: tuple[int, ...] = ()

    def is_in(self, state: State) -> bool:
        """True for weights of the family."""
        return self.marker in state

    def original_names(self, ours: str) -> list[str]:
        """Names of our weight in the original; several where it keeps apart what we stack."""
        name = ours
        for part, original in self.names:
            name = name.replace(part, original)
        if self.stacked and ".qkv." in name:
            return [name.replace("qkv", part) for part in self.stacked]
        return [name]

    def model_of(self, config: Any) -> Any:
        """The class that ``config`` configures."""
        return MODELS[type(config)]

    def is_transposed(self, ours: str, config: Any) -> bool:
        """True where the original's weight is the transpose of ours."""
        return False


class _GPT3Dev(Family):
    """GPT-2 with plain Linear layers: stock GPT-2 stores the same matrices transposed."""

    def is_in(self, state: State) -> bool:
        """See Family. The same names with the other shape are GPT-2 itself."""
        weight = state.get(self.marker)
        return weight is not None and weight.ndim == 2 and weight.shape[0] == 3 * weight.shape[1]

    def is_transposed(self, ours: str, config: Any) -> bool:
        """See Family."""
        turned = ours.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        return isinstance(config, GPT2Config) and turned


MODELS: dict[type[Any], type[Any]] = {
    TinyGPTConfig: TinyGPTForCausalLM,
    TinyGPT2Config: TinyGPT2ForCausalLM,
    NielsConfig: NielsForCausalLM,
    GPT3DevConfig: GPT3DevForCausalLM,
    GPT2Config: GPT2LMHeadModel,
}


def _shape(state: State, key: str, axis: int = 0) -> int:
    if key not in state or axis >= state[key].ndim:
        raise ModelLoadFailed(f"missing: {key}")
    return state[key].shape[axis]


def _count(state: State, pattern: str) -> int:
    """The number of different indices that ``pattern`` has in its group."""
    matches = (re.match(pattern, key) for key in state)
    return len({match[1] for match in matches if match})


def _agreed(declared: Declared, **measured: int) -> None:
    """Raise where a configuration contradicts the weights."""
    for name, value in measured.items():
        if declared.get(name, value) != value:
            raise ModelLoadFailed(
                f"the configuration says {name} {declared[name]}, the weights have {value}"
            )


def _heads(family: str, declared: Declared, width: int, layers: int, experts: int = 0) -> int:
    heads = declared.get("n_head") or PUBLISHED_HEADS.get((family, width, layers, experts))
    return _dividing("n_head", heads, width, f"n_embd {width}, n_layer {layers}")


def _dividing(name: str, heads: Any, width: int, form: str) -> int:
    if heads is None:
        raise ModelLoadFailed(
            f"{name} cannot be read from the weights and no published model has {form}: name a "
            "JSON file with it (convert --config FILE), or put it beside as config.json"
        )
    if type(heads) is not int or heads < 1 or width % heads:
        raise ModelLoadFailed(f"{name} {heads!r} does not divide the width {width}")
    return heads


def _end_of_text(vocab: int) -> int | None:
    return END_OF_TEXT if vocab > END_OF_TEXT else None


def _tinygpt(state: State, declared: Declared) -> TinyGPTConfig:
    is_moe = "blocks.0.moe.gate.weight" in state
    token, place = (
        ("token_emb.weight", "pos_emb.weight")
        if is_moe
        else ("token_embedding_table.weight", "position_embedding_table.weight")
    )
    vocab, width, window = _shape(state, token), _shape(state, token, 1), _shape(state, place)
    layers = _count(state, r"blocks\.(\d+)\.")
    experts = _shape(state, "blocks.0.moe.gate.weight") if is_moe else 0
    up = "moe.experts.0.up_proj" if is_moe else "ffwd.0"
    _agreed(declared, vocab_size=vocab, n_embd=width, block_size=window, n_layer=layers)
    _agreed(declared, **({"n_experts": experts} if is_moe else {}))
    return TinyGPTConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=_shape(state, f"blocks.0.{up}.weight"),
        num_hidden_layers=layers,
        num_attention_heads=_heads(
            "tinygpt-moe" if is_moe else "tinygpt", declared, width, layers, experts
        ),
        max_position_embeddings=window,
        num_experts=experts,
        num_experts_per_tok=declared.get("top_experts", 2),
        eos_token_id=_end_of_text(vocab),
    )


def _tinygpt2(state: State, declared: Declared) -> TinyGPT2Config:
    vocab = _shape(state, "token_embedding.weight")
    width = _shape(state, "token_embedding.weight", 1)
    layers = _count(state, r"blocks\.(\d+)\.")
    heads = _heads("tinygpt2", declared, width, layers)
    kv_heads = _shape(state, "blocks.0.attn.k_proj.weight") // (width // heads)
    hidden = _shape(state, "blocks.0.ffwd.0.weight")
    window = declared.get("block_size", 512)
    _agreed(declared, vocab_size=vocab, n_embd=width, n_layer=layers)
    _agreed(declared, gqa_kv_head=kv_heads, hidden_size=hidden)
    return TinyGPT2Config(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2 * window,
        prompt_window=window,
        eos_token_id=_end_of_text(vocab),
    )


def _niels(state: State, declared: Declared) -> NielsConfig:
    vocab, width = _shape(state, "tok_emb.weight"), _shape(state, "tok_emb.weight", 1)
    layers = _count(state, r"blocks\.(\d+)\.")
    is_second = "blocks.0.mlp.fc_a.weight" in state
    hidden = _shape(state, f"blocks.0.mlp.{'fc_a' if is_second else 'fc1'}.weight")
    _agreed(declared, V=vocab, C=width, L=layers, d_ff=hidden)
    if type(declared.get("T")) is not int:
        raise ModelLoadFailed(
            "T, the context, cannot be read from the weights: name a JSON file with the model_cfg "
            "(convert --config FILE), or put it beside as config.json"
        )
    return NielsConfig(
        version=2 if is_second else 1,
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=_dividing("H", declared.get("H"), width, f"C {width}, L {layers}"),
        max_position_embeddings=declared["T"],
        rope_theta=float(declared.get("rope_theta", 10000.0)),
        eos_token_id=6 if is_second else None,
    )


def _gpt3dev(state: State, declared: Declared) -> GPT2Config | GPT3DevConfig:
    """Stock GPT-2, unless a window that is narrower than the context makes bands."""
    if declared.get("use_pre_layernorm") is False:
        raise ModelLoadFailed("use_pre_layernorm false: no published model normalises afterwards")
    vocab, width = (_shape(state, "transformer.wte.weight", axis) for axis in (0, 1))
    positions = _shape(state, "transformer.wpe.weight")
    layers = _count(state, r"transformer\.h\.(\d+)\.")
    _agreed(declared, vocab_size=vocab, n_embd=width, n_positions=positions, n_layer=layers)
    heads = _heads("gpt3dev", declared, width, layers)
    hidden = _shape(state, "transformer.h.0.mlp.c_fc.weight")
    ends = {
        name: declared.get(name, _end_of_text(vocab)) for name in ("bos_token_id", "eos_token_id")
    }
    window = declared.get("window_size")
    if window is not None and window < positions:
        return GPT3DevConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=positions,
            sliding_window=window + 1,
            **ends,
        )
    return GPT2Config(
        vocab_size=vocab,
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_inner=hidden,
        activation_function="gelu",
        **ends,
    )


_NIELS = (
    ("model.token_embedding.", "tok_emb."),
    (".attn.out_proj.", ".attn.proj."),
    ("model.", ""),
)

FAMILIES: tuple[Family, ...] = (
    Family(
        name="tinygpt",
        marker="token_embedding_table.weight",
        embedding="token_embedding_table.weight",
        heads="n_head",
        configure=_tinygpt,
        tokenizer="gpt2",
        names=(
            ("model.token_embedding.", "token_embedding_table."),
            ("model.position_embedding.", "position_embedding_table."),
            (".attn.qkv.", ".attn.in_proj_"),
            ("model.", ""),
        ),
    ),
    Family(
        name="tinygpt-moe",
        marker="blocks.0.moe.gate.weight",
        embedding="token_emb.weight",
        heads="n_head",
        configure=_tinygpt,
        tokenizer="gpt2",
        names=(
            ("model.token_embedding.", "token_emb."),
            ("model.position_embedding.", "pos_emb."),
            (".attn.qkv.", ".attn.in_proj_"),
            (".ffwd.", ".moe."),
            ("model.", ""),
        ),
    ),
    Family(
        name="tinygpt2",
        marker="blocks.0.attn.q_proj.weight",
        embedding="token_embedding.weight",
        heads="n_head",
        configure=_tinygpt2,
        tokenizer="gpt2-instruct",
        names=(("model.", ""),),
        stacked=("q_proj", "k_proj", "v_proj"),
    ),
    Family(
        name="niels-v1",
        marker="blocks.0.mlp.fc1.weight",
        embedding="tok_emb.weight",
        heads="H",
        configure=_niels,
        tokenizer="bytes",
        names=((".ffwd.0.", ".mlp.fc1."), (".ffwd.2.", ".mlp.fc2."), *_NIELS),
    ),
    Family(
        name="niels-v2",
        marker="blocks.0.mlp.fc_a.weight",
        embedding="tok_emb.weight",
        heads="H",
        configure=_niels,
        tokenizer="sentencepiece",
        names=(
            (".ffwd.gate_proj.", ".mlp.fc_g."),
            (".ffwd.up_proj.", ".mlp.fc_a."),
            (".ffwd.down_proj.", ".mlp.fc_out."),
            *_NIELS,
        ),
        never_sampled=(3, 4, 5),  # the roles: only a prompt may name one
    ),
    _GPT3Dev(
        name="gpt3dev",
        marker="transformer.h.0.attn.c_attn.weight",
        embedding="transformer.wte.weight",
        heads="n_head",
        configure=_gpt3dev,
        tokenizer="gpt2-plain",
        names=(
            ("model.token_embedding.", "transformer.wte."),
            ("model.position_embedding.", "transformer.wpe."),
            ("model.blocks.", "transformer.h."),
            ("model.", "transformer."),
            (".ln1.", ".ln_1."),
            (".ln2.", ".ln_2."),
            (".attn.qkv.", ".attn.c_attn."),
            (".attn.out_proj.", ".attn.c_proj."),
            (".ffwd.0.", ".mlp.c_fc."),
            (".ffwd.2.", ".mlp.c_proj."),
        ),
    ),
)
