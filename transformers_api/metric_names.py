"""The name, the labels and the meaning of every metric. No other module names one.

What vLLM measures too has vLLM's name, labels and meaning, so that dashboards, alerts and
autoscalers made for it work unchanged; the rest begins with ``transformers_api_``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1),
    *(2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_GAP = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1),
    *(2.5, 5, 7.5, 10, 20, 40, 80),
)
_LONG = (
    *(0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240),
    *(480, 960, 1920, 7680),
)
_TOKENS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
_SHORT = (*(m / 10**e for e in (6, 5, 4, 3, 2, 1) for m in (1, 2.5, 5)), 1, 2.5)
_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, eq=False)
class Named:
    """One metric. The name of a counter ends in ``_total``."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_MODEL = ("model_name",)
_VLLM = "vllm:"
_OURS = "transformers_api_"


def _counter(name: str, text: str, *labels: str) -> Named:
    return Named(f"{name}_total", "counter", text, labels)


def _gauge(name: str, text: str, *labels: str) -> Named:
    return Named(name, "gauge", text, labels)


def _histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Named:
    return Named(name, "histogram", text, labels, buckets)


# Of the engine, by model. A "sequence" is one choice of one prompt.
FIRST = _histogram(
    f"{_VLLM}time_to_first_token_seconds",
    "From the submission of a sequence to its first token; waiting for the model is not in it.",
    _TTFT,
    *_MODEL,
)
GAP = _histogram(
    f"{_VLLM}inter_token_latency_seconds", "Between two tokens of a sequence.", _GAP, *_MODEL
)
TOTAL = _histogram(
    f"{_VLLM}e2e_request_latency_seconds", "From submission to the end.", _LONG, *_MODEL
)
QUEUE = _histogram(f"{_VLLM}request_queue_time_seconds", "Waiting for a slot.", _LONG, *_MODEL)
PREFILL = _histogram(
    f"{_VLLM}request_prefill_time_seconds", "From the slot to the first token.", _LONG, *_MODEL
)
DECODE = _histogram(
    f"{_VLLM}request_decode_time_seconds", "From the first token to the end.", _LONG, *_MODEL
)
INFERENCE = _histogram(
    f"{_VLLM}request_inference_time_seconds", "From the slot to the end.", _LONG, *_MODEL
)
PROMPT = _histogram(
    f"{_VLLM}request_prompt_tokens", "Tokens of the prompt of a sequence.", _TOKENS, *_MODEL
)
WRITTEN = _histogram(
    f"{_VLLM}request_generation_tokens", "Tokens that a sequence got.", _TOKENS, *_MODEL
)
STEP = _histogram(
    f"{_VLLM}iteration_tokens_total", "Tokens that one forward pass read.", _STEP, *_MODEL
)
PROMPT_TOKENS = _counter(f"{_VLLM}prompt_tokens", "Tokens of prompts that were read.", *_MODEL)
WRITTEN_TOKENS = _counter(f"{_VLLM}generation_tokens", "Tokens that were generated.", *_MODEL)
QUERIES = _counter(
    f"{_VLLM}prefix_cache_queries", "Tokens of prompts looked for in the prefix cache.", *_MODEL
)
HITS = _counter(
    f"{_VLLM}prefix_cache_hits", "Those of them that were there and not read again.", *_MODEL
)
DRAFTS = _counter(f"{_VLLM}spec_decode_num_drafts", "Passes that read tokens ahead.", *_MODEL)
DRAFTED = _counter(f"{_VLLM}spec_decode_num_draft_tokens", "Tokens that they read ahead.", *_MODEL)
ACCEPTED = _counter(
    f"{_VLLM}spec_decode_num_accepted_tokens", "Those of them that did come next.", *_MODEL
)
SUCCESS = _counter(
    f"{_VLLM}request_success",
    "Sequences that ended, by how: stop, length, abort, error.",
    *_MODEL,
    "finished_reason",
)
# What is resident, when asked.
RUNNING = _gauge(f"{_VLLM}num_requests_running", "Sequences that have a slot.", *_MODEL)
WAITING = _gauge(f"{_VLLM}num_requests_waiting", "Sequences that wait for a slot.", *_MODEL)
KV = _gauge(
    f"{_VLLM}kv_cache_usage_perc", "Reserved share of the KV cache's budget, 0 to 1.", *_MODEL
)
INFO = _gauge(
    f"{_OURS}model_info",
    "1 for the resident model; kernels: native or torch; isa: what native ones are compiled for.",
    *(*_MODEL, "device", "dtype", "quantization", "kernels", "isa", "mode"),
)
COMPILED = _counter(
    f"{_OURS}kernel_compilations", "Runs of the compiler for native kernels, by result.", "result"
)
WEIGHTS = _gauge(f"{_OURS}model_bytes", "Bytes of its weights.", *_MODEL)
ADAPTERS = _gauge(f"{_OURS}adapter_bytes", "Bytes of an adapter in memory.", *_MODEL)
KV_BYTES = _gauge(
    f"{_OURS}kv_cache_bytes", "Bytes of its KV cache's rows, whether written or not.", *_MODEL
)
KV_USED = _gauge(
    f"{_OURS}kv_cache_used_bytes", "Those of them that running sequences have reserved.", *_MODEL
)
KV_BUDGET = _gauge(f"{_OURS}kv_cache_budget_bytes", "Bytes that the KV cache may take.", *_MODEL)
LEASES = _gauge(f"{_OURS}model_leases", "Requests that hold the resident model.", *_MODEL)
CALLERS = _gauge(f"{_OURS}model_callers_waiting", "Requests that wait for a model.", *_MODEL)
PROGRESS = _gauge(
    f"{_OURS}model_loading_progress", "How far the model that is coming is, 0 to 1.", *_MODEL
)
ACTIVE = _gauge(f"{_OURS}requests_active", "Requests that have a place (MAX_INFLIGHT, MAX_QUEUE).")
READY = _gauge(f"{_OURS}ready", "1 while `/readyz` answers 200.")
THREADS = _gauge(f"{_OURS}threads", "Threads of the process.")
BUILD = _gauge(f"{_OURS}build_info", "1, with the version of the server.", "version")
# Of models.
LOAD = _histogram(f"{_OURS}model_load_seconds", "Loading a model into memory.", _LONG, *_MODEL)
LOAD_FAILED = _counter(
    f"{_OURS}model_load_failures",
    "Models that could not be had, by the error's code.",
    *_MODEL,
    "code",
)
EVICTED = _counter(f"{_OURS}model_evictions", "Models taken out of memory.", *_MODEL)
SWAPS = _counter(f"{_OURS}model_swaps", "Loads of another model than the one before.")
MODEL_WAIT = _histogram(
    f"{_OURS}model_wait_seconds", "From a request for a model to having it.", _LONG, *_MODEL
)
# Of requests.
HTTP = _counter(
    "http_requests",
    "Requests that ended, by route and class of status: 2xx, 4xx, 5xx.",
    "handler",
    "method",
    "status",
)
HTTP_TIME = _histogram(
    "http_request_duration_seconds",
    "From the arrival of a request to its last byte.",
    (0.005, *_LONG),
    "handler",
    "method",
)
REFUSED = _counter(
    f"{_OURS}refusals", "Requests that ended with an error, by its code, also in streams.", "code"
)
# Of what answers are held to, and of what they are made.
COMPILE = _histogram(
    f"{_OURS}constraint_compile_seconds",
    "Compiling the grammar of a form or of tools that is new, the first mask included.",
    _SHORT,
)
MASK_WAIT = _histogram(
    f"{_OURS}constraint_wait_seconds",
    "Waiting of the engine for the mask of one token, which another thread works out.",
    _SHORT,
)
CONSTRAINT_FAILURES = _counter(
    f"{_OURS}constraint_failures",
    "Requests that ended because of the form they asked for: refused (it cannot be enforced), "
    "unavailable (not with this model's tokens), failed (while the answer was written).",
    "reason",
)
CALLS = _counter(
    f"{_OURS}tool_calls",
    "Calls in answers, by the choice of the request (auto, required) and their format: derived "
    "from the template, or our own.",
    *(*_MODEL, "choice", "format"),
)
REASONING = _counter(
    f"{_OURS}reasoning_tokens", "Tokens that models wrote before their answers.", *_MODEL
)
STORED = _gauge(f"{_OURS}responses_stored", "Answers of `/v1/responses` that are kept.")
STORED_BYTES = _gauge(f"{_OURS}responses_stored_bytes", "Bytes of them.")
GONE = _counter(f"{_OURS}client_disconnects", "Clients that left before their answer was complete.")
TRACES = _counter(f"{_OURS}traces", "Answers with a trace.")
INSPECTIONS = _counter(f"{_OURS}inspections", "Questions of `/inspect/*` that were answered.")
# Of the process, as prometheus_client names them on Linux.
PROCESS = (
    _gauge("process_resident_memory_bytes", "Memory that is in RAM."),
    _gauge("process_virtual_memory_bytes", "Address space."),
    Named("process_cpu_seconds_total", "counter", "Time on the processors."),
    _gauge("process_open_fds", "Open file descriptors."),
    _gauge("process_max_fds", "Most file descriptors that may be open."),
    _gauge("process_start_time_seconds", "When it started, in seconds since 1970."),
)
ALL: tuple[Named, ...] = tuple(v for v in list(vars().values()) if isinstance(v, Named)) + PROCESS


def described() -> list[tuple[str, str, str, str]]:
    """(name, type, labels, meaning) of every metric, for the documents."""
    return [(m.name, m.kind, ", ".join(m.labels), m.help) for m in ALL]
