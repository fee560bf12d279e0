"""Every setting, and the one reader of the environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

GIB = 1 << 30


class SettingError(ValueError):
    """A setting has a value that it may not have; the message names setting, value and choices."""


def _bool(text: str) -> bool:
    word = text.strip().lower()
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise ValueError("true or false")


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return parse


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise ValueError(f"a number from {low:g} to {high:g}")
        return value

    return parse


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return text.lower()

    return parse


def _device(text: str) -> str:
    name, _, index = text.lower().partition(":")
    if name in ("auto", "cpu", "mps") and not index:
        return name
    if name == "cuda" and (not _ or index.isdigit()):
        return text.lower()
    raise ValueError("auto, cpu, cuda, cuda:N or mps")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _origins(text: str) -> tuple[str, ...]:
    origins = _names(text)
    for origin in origins:
        scheme, found, host = origin.partition("://")
        if not found or scheme not in ("http", "https") or set(host) & set("/*?()[]|\\ "):
            raise ValueError("exact origins such as http://localhost:3000, separated by commas")
    return origins


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _setting(
    default: Any, parse: Callable[[str], Any], help_: str, *, aliases: tuple[str, ...] = ()
) -> Any:
    metadata = {"parse": parse, "help": help_, "aliases": aliases}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def _default_store() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "transformers-api" / "models"


def _default_hf_home() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "huggingface"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every option of the server. The environment name of a field is its name in upper case."""

    host: str = _setting("127.0.0.1", str, "Address to listen on.", aliases=("API_HOST",))
    port: int = _setting(5000, _integer(0, 65535), "Port to listen on.", aliases=("API_PORT",))
    default_model: str = _setting(
        "smollm2-135m-instruct", str, "Model of requests that name none, loaded at start."
    )
    preload_model: bool = _setting(True, _bool, "Load DEFAULT_MODEL at start.")
    auto_load: bool = _setting(
        True, _bool, "A request for a model that is not resident loads it; else it gets 503."
    )
    allow_download: bool | None = _setting(
        None,
        _bool,
        "Fetch models from the Hub, also ids that are not registered. Default: true when HOST is "
        "a loopback address, else false.",
    )
    model_registry_path: Path | None = _setting(
        None, _path, "JSON or YAML file with more models, or other ones."
    )
    include_default_models: bool = _setting(True, _bool, "Keep the built-in registry entries.")
    model_allow_list: tuple[str, ...] = _setting(
        (), _names, "Comma-separated ids: only these may be served."
    )
    model_store: Path = _setting(
        _default_store, _path, "Where converted models are kept.", aliases=("CKPT_DIR",)
    )
    hf_home: Path = _setting(
        _default_hf_home, _path, "Hugging Face cache folder.", aliases=("TRANSFORMERS_CACHE",)
    )
    hf_token: str | None = _setting(None, str, "Token for private models of the Hub.")
    default_device: str = _setting(
        "auto", _device, "auto, cpu, cuda, cuda:N or mps.", aliases=("DEVICE",)
    )
    dtype: str = _setting(
        "auto",
        _choice("auto", "float32", "bfloat16", "float16"),
        "Serving dtype. auto: float32 on CPU, where tokens then do not depend on who shares the "
        "batch; the checkpoint's own on GPUs.",
    )
    max_context_tokens: int = _setting(
        2048, _integer(8, 1 << 24), "Context window where a model's config states none."
    )
    max_prompt_bytes: int | None = _setting(
        None,
        _integer(1, 1 << 26),
        "Bytes of text in one request's prompt. Default: 16384 on /chat/stream and /inspect/*, "
        "1 MiB elsewhere.",
    )
    max_inflight: int = _setting(
        32, _integer(1, 1024), "Sequences that are decoded together (slots of the KV cache)."
    )
    max_queue: int = _setting(
        128, _integer(0, 65536), "Sequences that may wait for a slot; more are refused with 429."
    )
    prefill_chunk: int = _setting(
        256, _integer(1, 65536), "Prompt tokens per step, between two decode steps."
    )
    kv_cache_gib: float | None = _setting(
        None,
        _number(0.001, 65536),
        "GiB for the KV cache. Default: a quarter of the memory that is free after loading.",
    )
    torch_threads: int | None = _setting(
        None, _integer(1, 1024), "CPU threads of the engine. Default: the cores it may use."
    )
    swap_overlap: bool = _setting(
        False,
        _bool,
        "Load the next model before the resident one is evicted, where both fit with a fifth "
        "to spare.",
    )
    swap_after_s: float = _setting(
        10.0,
        _number(0, 3600),
        "Seconds that a request for another model waits while the resident one is busy, before "
        "the switch is decided.",
    )
    drain_s: float = _setting(
        300.0,
        _number(0, 86400),
        "Seconds that running answers may take to finish before a switch or unload ends them.",
    )
    model_wait_s: float = _setting(
        600.0, _number(0.1, 86400), "Seconds that a request waits for its model to be resident."
    )
    idle_unload_s: float | None = _setting(
        None, _number(1, 1e9), "Unload the model after this many idle seconds. Default: never."
    )
    keepalive_s: float = _setting(
        15.0, _number(0.05, 3600), "Seconds of silence in a stream before a comment is sent."
    )
    graceful_s: int = _setting(
        30, _integer(1, 3600), "Seconds that running answers get after SIGTERM."
    )
    enable_embeddings_backend: bool = _setting(
        False, _bool, "Serve /v1/embeddings; else it answers 501."
    )
    inspect_enabled: bool = _setting(
        True, _bool, "Serve traces, /chat/stream and /inspect/*; else they answer 403."
    )
    trace_max_bytes_per_token: int = _setting(
        1 << 18, _integer(1, 1 << 30), "Bytes that the trace of one token may have, at most."
    )
    trace_max_layers: int = _setting(
        4,
        _integer(1, 4096),
        "Layers whose attention is traced, unless it is sent as the likeliest keys or reduced "
        "over heads.",
    )
    trace_max_requests: int = _setting(
        2, _integer(1, 1024), "Requests that are traced at once; more are refused with 429."
    )
    inspect_max_tokens: int = _setting(2048, _integer(1, 1 << 24), "Tokens that /inspect/* reads.")
    inspect_max_json_cells: int = _setting(
        1 << 18, _integer(1, 1 << 30), "Numbers that /inspect/* sends as JSON."
    )
    inspect_max_cells: int = _setting(
        1 << 24, _integer(1, 1 << 32), "Numbers that /inspect/* sends in a binary format."
    )
    inspect_timeout_s: float = _setting(
        30.0, _number(0.01, 3600), "Seconds that one inspection may take."
    )
    inspect_queue: int = _setting(
        4, _integer(0, 1024), "Inspections that may wait for the one that runs."
    )
    attribution_max_tokens: int = _setting(
        512, _integer(1, 1 << 24), "Tokens that /inspect/attribution reads."
    )
    rate_limit_per_min: int = _setting(
        10,
        _integer(0, 1_000_000),
        "Requests per minute and client on /chat/stream and /inspect/*; 0 for no limit.",
    )
    rate_limit_burst: int = _setting(
        3, _integer(1, 1_000_000), "How many of these a client may send at once."
    )
    cors_allow_origins: tuple[str, ...] = _setting(
        (),
        _origins,
        "Comma-separated exact origins of browser applications.",
        aliases=("ALLOWED_ORIGINS",),
    )
    log_level: str = _setting(
        "info", _choice("debug", "info", "warning", "error"), "How much is logged."
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
        return cls(**values)

    @property
    def listens_on_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in ("localhost", "::1", "[::1]") or self.host.startswith("127.")

    @property
    def downloads_allowed(self) -> bool:
        """ALLOW_DOWNLOAD with its default worked out."""
        return self.listens_on_loopback if self.allow_download is None else self.allow_download

    @property
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
        shown = "***" if name.endswith("_TOKEN") else repr(text)
        raise SettingError(f"{name}={shown} is not allowed: expected {error}") from None


def described() -> list[tuple[str, str, str, str]]:
    """(NAME, default, aliases, help) of every setting, for documents and ``check``."""
    rows = []
    for option in fields(Settings):
        default = "" if option.default is MISSING else option.default
        if default in (None, ()):
            default = ""
        shown = str(default).lower() if isinstance(default, bool) else str(default)
        aliases = ", ".join(option.metadata["aliases"])
        rows.append((option.name.upper(), shown, aliases, option.metadata["help"]))
    return rows
