"""Settings of models: which there are, where they lie, how they are run, which one is in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers_api.config import parsers as to
from transformers_api.config.environment import cache_folder
from transformers_api.config.option import setting


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Options of models."""

    default_model: str = setting(
        "smollm2-135m-instruct", str, "The id or path of requests that name none, loaded at start."
    )
    preload_model: bool = setting(True, to.boolean, "Load DEFAULT_MODEL at start.")
    auto_load: bool = setting(
        True, to.boolean, "A request for a model that is not resident loads it; else it gets 503."
    )
    allow_download: bool | None = setting(
        None,
        to.boolean,
        "Fetch models from the Hub, also ids that are not registered, and the packages of built-in "
        "models. Default: true when HOST is "
        "a loopback address or there are API keys, else false.",
    )
    model_registry_path: Path | None = setting(
        None, to.path, "JSON or YAML file with more models, or other ones."
    )
    include_default_models: bool = setting(True, to.boolean, "Keep the built-in registry entries.")
    model_allow_list: tuple[str, ...] = setting(
        (), to.names, "Comma-separated ids: only these may be served."
    )
    model_store: Path = setting(
        cache_folder("transformers-api", "models"),
        to.path,
        "Where converted models are kept, and what was found out about models.",
        aliases=("CKPT_DIR",),
    )
    hf_home: Path = setting(cache_folder("huggingface"), to.path, "Hugging Face cache folder.")
    hf_hub_cache: Path | None = setting(
        None,
        to.path,
        "Where models of the Hub lie. Default: hub in HF_HOME.",
        aliases=("HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"),
    )
    hf_token: str | None = setting(
        None, str, "Token for private models of the Hub.", is_secret=True
    )
    default_device: str = setting(
        "auto", to.device, "auto, cpu, cuda, cuda:N or mps.", aliases=("DEVICE",)
    )
    dtype: str = setting(
        "auto",
        to.choice("auto", "float32", "bfloat16", "float16"),
        "Serving dtype. auto on a CPU: with NATIVE_KERNELS bfloat16 weights, or float32 for a "
        "float32 checkpoint of at most 64 MiB; else float32. Tokens then do not depend on who "
        "shares the batch. auto on a GPU: the checkpoint's own; of a float32 one above 64 MiB "
        "bfloat16, or float16 where the GPU has no other.",
    )
    native_kernels: bool = setting(
        True,
        to.boolean,
        "Run models on CPU kernels of our own where the processor has AVX2, AVX-512 or NEON and "
        "there is a C++ compiler: weights in bfloat16, several times as fast, and no bit of an "
        "answer depends on who shares the batch. Elsewhere torch runs them.",
    )
    native_isa: str = setting(
        "auto",
        to.choice(
            *("auto", "amx", "avx2", "avx2_vnni", "avx512", "avx512_bf16", "neon", "neon_bf16"),
            "none",
        ),
        "The instruction set of the kernels. auto: the best that the processor has; another one "
        "gives other bits. none: without kernels, as NATIVE_KERNELS=false.",
    )
    quantization: str = setting(
        "auto",
        to.choice("auto", "stored", "gguf", "none", "int8", "int4"),
        "Width of the weights on the native kernels. stored (or gguf): that nearest to a GGUF file "
        "or a quantised checkpoint, else none. auto: the same, but none for less than 300 million "
        "weights. int8: 8.5 bits; int4: 5 bits (the output layer stays int8), which small models "
        "may only have where it changes their weights by less than 2 %. Both need NATIVE_KERNELS; "
        "a model that cannot have them is not loaded. none: plain numbers.",
    )
    native_cache: Path = setting(
        cache_folder("transformers-api", "native"),
        to.path,
        "Where compiled kernels are kept; `python -m transformers_api kernels` compiles them.",
    )
    max_context_tokens: int = setting(
        2048, to.integer(8, 1 << 24), "Context window where a model's config states none."
    )
    max_prompt_bytes: int | None = setting(
        None,
        to.integer(1, 1 << 26),
        "Bytes of text in one request's prompt. Default: 16384 on /chat/stream and /inspect/*, "
        "1 MiB elsewhere.",
    )
    max_inflight: int = setting(
        32, to.integer(1, 1024), "Sequences that are decoded together (slots of the KV cache)."
    )
    max_queue: int = setting(
        128, to.integer(0, 65536), "Sequences that may wait for a slot; more are refused with 429."
    )
    prefill_chunk: int = setting(
        256,
        to.integer(1, 65536),
        "Most prompt tokens per step; while answers are written only so many that their tokens "
        "come evenly.",
    )
    prefill_alone: int = setting(
        1024,
        to.integer(0, 65536),
        "The same for a prompt that is alone: where its steps take no longer than a quarter of a "
        "second, by those before, they are as few as that allows. Only with NATIVE_KERNELS.",
    )
    prompt_lookup_tokens: int = setting(
        0,
        to.integer(0, 64),
        "While a single answer is written, guess up to so many of its next tokens from what was "
        "said before, and check them in one step: the same tokens, sooner where text repeats "
        "itself. 0 = off. Only with NATIVE_KERNELS.",
    )
    kv_cache_gib: float | None = setting(
        None,
        to.number(0.001, 65536),
        "GiB for the KV cache. Default: a quarter of the memory that is free after loading.",
    )
    kv_cache_dtype: str = setting(
        "auto",
        to.choice("auto", "int8"),
        "Numbers of keys and values in the KV cache. auto: those of DTYPE. int8: codes of 8 bits "
        "with a scale for every 32, a little more than half the bytes of bfloat16. Only with "
        "NATIVE_KERNELS; the log names a model that keeps its own.",
    )
    max_adapters_mb: int = setting(
        512,
        to.integer(1, 1 << 20),
        "Mebibytes of LoRA adapters that are kept in memory beside their base; those that were "
        "used longest ago go first.",
    )
    torch_threads: int | None = setting(
        None, to.integer(1, 1024), "CPU threads of the engine. Default: the cores it may use."
    )
    lazy_torch: bool = setting(
        True,
        to.boolean,
        "Import torch and transformers without what only compilers and clusters need of them; that "
        "is imported at its first use. false: as `import` does, for who debugs torch.",
    )
    swap_overlap: bool = setting(
        False,
        to.boolean,
        "Load the next model before the resident one is evicted, where both fit with a fifth "
        "to spare.",
    )
    swap_after_s: float = setting(
        10.0,
        to.number(0, 3600),
        "Seconds that a request for another model waits while the resident one is busy, before "
        "the switch is decided.",
    )
    swap_min_resident_s: float = setting(
        6.0,
        to.number(0, 3600),
        "Seconds that a model is kept, at least, where several are asked for all the time.",
    )
    packed_store_mb: int = setting(
        10240,
        to.integer(0, 1 << 30),
        "Mebibytes of packed weights that are kept in MODEL_STORE, so that a model that was served "
        "before is loaded in a fraction of the time; those that were used longest ago go first. 0: "
        "none are. Only with NATIVE_KERNELS.",
    )
    sleeping_models: int = setting(
        3,
        to.integer(0, 1000),
        "Unloaded models of which everything but the weights is kept, so that they come back in a "
        "fraction of the time. Only with NATIVE_KERNELS.",
    )
    sleeping_kv_mb: int = setting(
        256,
        to.integer(0, 1 << 30),
        "Mebibytes of keys and values that SLEEPING_MODELS keep of their last conversations, all "
        "together, so that these go on without being read again. Given back where a model lacks "
        "memory; 0: none are kept.",
    )
    drain_s: float = setting(
        300.0,
        to.number(0, 86400),
        "Seconds that running answers may take to finish before a switch or unload ends them.",
    )
    model_wait_s: float = setting(
        600.0, to.number(0.1, 86400), "Seconds that a model is waited for and its load may take."
    )
    idle_unload_s: float | None = setting(
        None, to.number(1, 1e9), "Unload the model after this many idle seconds. Default: never."
    )
