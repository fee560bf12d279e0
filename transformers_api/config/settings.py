"""Every setting, and the one reader of the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers_api.config import parsers as to
from transformers_api.config.cluster_settings import ClusterSettings
from transformers_api.config.option import cache_folder, setting

GIB = 1 << 30


class SettingError(ValueError):
    """A setting has a value that it may not have; the message names setting, value and choices."""


@dataclass(frozen=True, kw_only=True)
class Settings(ClusterSettings):
    """Every option of the server. The environment name of a field is its name in upper case."""

    host: str = setting("127.0.0.1", str, "Address to listen on.", aliases=("API_HOST",))
    port: int = setting(5000, to.integer(0, 65535), "Port to listen on.", aliases=("API_PORT",))
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
        "a loopback address or API_KEYS_FILE is set, else false.",
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
    sleeping_models: int = setting(
        3,
        to.integer(0, 1000),
        "Unloaded models of which everything but the weights is kept, so that they come back in a "
        "fraction of the time. Only with NATIVE_KERNELS.",
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
    keepalive_s: float = setting(
        15.0, to.number(0.05, 3600), "Seconds of silence in a stream before a comment is sent."
    )
    request_timeout_s: float | None = setting(
        3600.0,
        to.seconds_or_off(0.01, 1e6),
        "Seconds from the arrival of a request to the end of its answer, or off.",
    )
    receive_timeout_s: float = setting(
        30.0, to.number(0.1, 3600), "Seconds in which a client must send its whole request."
    )
    send_timeout_s: float = setting(
        20.0, to.number(0.1, 3600), "Seconds after which a client that reads nothing is given up."
    )
    step_timeout_s: float | None = setting(
        300.0,
        to.seconds_or_off(0.1, 1e6),
        "Seconds that one step of the engine may take before the process is restarted, or off.",
    )
    residency_lock: bool = setting(
        True,
        to.boolean,
        "Refuse to start beside another server with the same MODEL_STORE and DEFAULT_DEVICE.",
    )
    graceful_s: int = setting(
        30, to.integer(1, 3600), "Seconds that running answers get after SIGTERM."
    )
    responses_store_mb: int = setting(
        64,
        to.integer(0, 1 << 20),
        "MiB of answers of /v1/responses that are kept, so that later requests go on from them; "
        "0: none are.",
    )
    responses_store_ttl_s: float = setting(
        3600.0, to.number(1, 1e9), "Seconds that such an answer is kept after its last use."
    )
    enable_embeddings_backend: bool = setting(
        False, to.boolean, "Serve /v1/embeddings; else it answers 501."
    )
    inspect_enabled: bool = setting(
        True, to.boolean, "Serve traces, /chat/stream and /inspect/*; else they answer 403."
    )
    trace_max_bytes_per_token: int = setting(
        1 << 18, to.integer(1, 1 << 30), "Bytes that the trace of one token may have, at most."
    )
    trace_max_layers: int = setting(
        4,
        to.integer(1, 4096),
        "Layers whose attention is traced, unless it is sent as the likeliest keys or reduced "
        "over heads.",
    )
    trace_max_requests: int = setting(
        2, to.integer(1, 1024), "Requests traced at once; of one layer each eight times as many."
    )
    inspect_max_tokens: int = setting(2048, to.integer(1, 1 << 24), "Tokens that /inspect/* reads.")
    inspect_max_json_cells: int = setting(
        1 << 18, to.integer(1, 1 << 30), "Numbers that /inspect/* sends as JSON."
    )
    inspect_max_cells: int = setting(
        1 << 24, to.integer(1, 1 << 32), "Numbers that /inspect/* sends in a binary format."
    )
    inspect_timeout_s: float = setting(
        30.0, to.number(0.01, 3600), "Seconds that one inspection may take."
    )
    inspect_queue: int = setting(
        64, to.integer(0, 1024), "Inspections that may wait, and requests for a trace; else 429."
    )
    attribution_max_tokens: int = setting(
        512, to.integer(1, 1 << 24), "Tokens that /inspect/attribution reads."
    )
    api_keys_file: Path | None = setting(
        None,
        to.path,
        "File of API keys, which `keys add` writes; every request then needs one of them.",
    )
    rate_limit_per_min: int | None = setting(
        None,
        to.integer(0, 1_000_000),
        "Requests per minute and client, 0 for no limit. Default: 10 on /chat/stream and "
        "/inspect/*, but for clients on this machine where HOST is loopback; else no limit.",
    )
    rate_limit_burst: int = setting(
        3, to.integer(1, 1_000_000), "How many of these a client may send at once."
    )
    rate_limit_tokens_per_min: int | None = setting(
        None,
        to.integer(1, 1_000_000_000),
        "Tokens per minute and client, of prompts and answers together. Default: no limit.",
    )
    redis_url: str | None = setting(
        None,
        to.redis_url,
        "Redis that counts for several servers, such as redis://host:6379/0.",
        is_secret=True,
    )
    trusted_proxies: int = setting(
        0,
        to.integer(0, 16),
        "Proxies in front that add to X-Forwarded-For; with 0 the header is not believed.",
    )
    cors_allow_origins: tuple[str, ...] = setting(
        (),
        to.origins,
        "Comma-separated exact origins of browser applications.",
        aliases=("ALLOWED_ORIGINS",),
    )
    allowed_hosts: tuple[str, ...] = setting(
        (),
        to.hosts,
        "Comma-separated hosts that mean this server, .example.org with all below it, * for any. "
        "Without API_KEYS_FILE others get 421, but for HOST, loopback, names without a dot, and "
        "any address where HOST is 0.0.0.0 or ::.",
    )
    log_level: str = setting(
        "info", to.choice("debug", "info", "warning", "error"), "How much is logged."
    )
    log_format: str = setting(
        "auto", to.choice("auto", "text", "json"), "auto: text on a terminal, else JSON lines."
    )
    log_prompts: bool = setting(False, to.boolean, "Log what clients ask and models answer.")
    metrics_enabled: bool | None = setting(
        None, to.boolean, "Serve /metrics; else it answers 404. Default: as that of ALLOW_DOWNLOAD."
    )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read every setting; the first bad value raises SettingError with one clear line.

        A setting's own name wins over its aliases; an empty value counts as unset.
        """
        environ = os.environ if environ is None else environ
        values = {}
        for option in fields(cls):
            for name in (option.name.upper(), *option.metadata["aliases"]):
                if text := environ.get(name, "").strip():
                    values[option.name] = _parse(option, name, text)
                    break
        if values.get("native_isa") == "none":
            values["native_kernels"] = False
        made = cls(**values)
        if made.quantization in ("int8", "int4") and not made.native_kernels:
            raise SettingError(
                f"QUANTIZATION={made.quantization} is not allowed: it needs NATIVE_KERNELS=true"
            )
        if made.kv_cache_dtype == "int8" and not made.native_kernels:
            raise SettingError("KV_CACHE_DTYPE=int8 is not allowed: it needs NATIVE_KERNELS=true")
        return made

    @property
    def listens_on_loopback(self) -> bool:
        """True where only this machine can reach the server."""
        return self.host in ("localhost", "::1", "[::1]") or self.host.startswith("127.")

    @property
    def downloads_allowed(self) -> bool:
        """ALLOW_DOWNLOAD with its default worked out."""
        return self._is_guarded if self.allow_download is None else self.allow_download

    @property
    def hub_cache(self) -> Path:
        """HF_HUB_CACHE with its default worked out."""
        return self.hf_hub_cache or self.hf_home / "hub"

    @property
    def metrics_allowed(self) -> bool:
        """METRICS_ENABLED with its default worked out."""
        return self._is_guarded if self.metrics_enabled is None else self.metrics_enabled

    @property
    def _is_guarded(self) -> bool:
        return self.listens_on_loopback or self.api_keys_file is not None

    @property
    def inspected_per_min(self) -> int:
        """RATE_LIMIT_PER_MIN of /chat/stream and /inspect/*."""
        return 10 if self.rate_limit_per_min is None else self.rate_limit_per_min

    @cached_property
    def prompt_bytes(self) -> int:
        """MAX_PROMPT_BYTES of most routes."""
        return self.max_prompt_bytes or 1 << 20

    @property
    def inspected_prompt_bytes(self) -> int:
        """MAX_PROMPT_BYTES of /chat/stream and /inspect/*."""
        return self.max_prompt_bytes or 1 << 14

    @property
    def threads(self) -> int:
        """Threads of the HTTP server: one per request that runs or waits, and some for the rest."""
        return self.max_inflight + self.max_queue + 32


def _parse(option: Field[Any], name: str, text: str) -> Any:
    try:
        return option.metadata["parse"](text)
    except ValueError as error:
        text = repr(text[:200]) if option.repr else "***"
        raise SettingError(f"{name}={text} is not allowed: expected {error}") from None
