"""Settings of the server: where it listens, who may ask, how much and how long, what it shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers_api.config import parsers as to
from transformers_api.config.option import setting


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Options of the server."""

    host: str = setting("127.0.0.1", str, "Address to listen on.", aliases=("API_HOST",))
    port: int = setting(5000, to.integer(0, 65535), "Port to listen on.", aliases=("API_PORT",))
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
    intervene_enabled: bool = setting(
        True, to.boolean, "Serve `intervene`, which changes a model for a request; else 403."
    )
    runs_max_mb: int = setting(
        256,
        to.integer(0, 1 << 20),
        "MiB of runs (`store`) that are kept in MODEL_STORE, of one at most a quarter; 0: none.",
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
    inspect_file_mb: int = setting(
        192,
        to.integer(1, 4096),
        "MiB of a lens or sparse autoencoder that is sent; a key may keep twice as many of each in "
        "MODEL_STORE, all together eight times.",
    )
    attribution_max_tokens: int = setting(
        512, to.integer(1, 1 << 24), "Tokens that /inspect/attribution reads."
    )
    api_keys_file: Path | None = setting(
        None,
        to.path,
        "File of API keys, which `keys add` writes; every request then needs one of them.",
    )
    api_keys_redis: bool = setting(
        False,
        to.boolean,
        "The API keys are in the redis of REDIS_URL, for all servers with it; `keys add` writes "
        "them there, and every request needs one of them.",
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
    client_max_inflight: int = setting(
        0,
        to.integer(0, 1_000_000),
        "Requests that one client (its key, else its address) may have in flight, on all servers "
        "with the same REDIS_URL together; 0 for no limit.",
    )
    redis_url: str | None = setting(
        None,
        to.redis_url,
        "Redis that counts for several servers, such as redis://host:6379/0; with ENGINE=ray or "
        "openai it also keeps answers of /v1/responses and the tokens of recent ones for all.",
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
        "Without API keys others get 421, but for HOST, loopback, names without a dot, and "
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
