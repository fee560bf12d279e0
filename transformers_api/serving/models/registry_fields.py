"""The fields of a registry entry, and what is allowed in each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, get_args
from urllib.parse import urlsplit

from transformers_api.serving.models.registry_text import MAX_NESTING
from transformers_api.serving.models.spec import PoolingMode

Check = Callable[[Any], str | None]  # what would be allowed, or None when the value is

_NAME = re.compile(r"[A-Za-z0-9][\w./:@+ -]{0,199}", re.ASCII)
REPO = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)
_PACKAGE = re.compile(r"[A-Za-z0-9][\w.-]{0,199}", re.ASCII)
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?", re.ASCII)
_ENCODING = re.compile(r"[a-z0-9_]{1,40}", re.ASCII)
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_QUANTIZATIONS = ("auto", "stored", "gguf", "none", "int8", "int4")
_CHAT = ("template", "transcript", "off")
MAX_MARK = 100  # characters
ENCODERS = ("encoder", "cross_encoder")
_POOLINGS = get_args(PoolingMode)
MOST_REPLICAS = 4096


def _is_upstream(value: Any) -> str | None:
    expected = "the URL of a server with OpenAI's API, such as http://127.0.0.1:8000/v1"
    if not isinstance(value, str) or set(value) & set(" \\\r\n\t") or not value.isascii():
        return expected
    try:
        parts = urlsplit(value)
        fits = parts.port != 0
    except ValueError:
        return expected
    fits = fits and parts.scheme in ("http", "https") and bool(parts.hostname)
    return None if fits and not (parts.query or parts.fragment or "@" in parts.netloc) else expected


def _matches(pattern: re.Pattern[str], expected: str) -> Check:
    def check(value: Any) -> str | None:
        fits = isinstance(value, str) and pattern.fullmatch(value) and ".." not in value
        return None if fits else expected

    return check


def _one_of(allowed: tuple[str, ...]) -> Check:
    return lambda value: None if value in allowed else f"one of {', '.join(allowed)}"


def _number(low: float, high: float, kinds: tuple[type, ...] = (int, float)) -> Check:
    what = "a whole number" if kinds == (int,) else "a number"

    def check(value: Any) -> str | None:
        fits = type(value) in kinds and low <= value <= high
        return None if fits else f"{what} from {low:g} to {high:g}"

    return check


def _whole(low: int, high: int) -> Check:
    return _number(low, high, (int,))


def _is_bool(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _is_metadata(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "an object"
    wrong = _not_json(value, "metadata")
    return f"what JSON can say, without {wrong}" if wrong else None


def _not_json(value: Any, where: str, depth: int = 0) -> str | None:
    """The first part of a value that JSON has no form for; dates are text already."""
    if depth > MAX_NESTING:
        return f"nesting of more than {MAX_NESTING} at {where[:80]}"
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str)]:
            return f"the key {wrong[0]!r} at {where[:80]}"
        parts = ((f"{where}.{key}", part) for key, part in value.items())
    elif isinstance(value, list):
        parts = ((f"{where}[{index}]", part) for index, part in enumerate(value))
    elif isinstance(value, float) and not math.isfinite(value):
        return f"{value} at {where[:80]}"
    elif isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 1 << 63:
        return f"an integer of more than 64 bits at {where[:80]}"
    elif isinstance(value, str) and not _is_text(value):
        return f"half a surrogate pair at {where[:80]}"
    elif value is None or isinstance(value, (str, bool, int, float)):
        return None
    else:
        return f"the {type(value).__name__} at {where[:80]}"
    reasons = (_not_json(part, name, depth + 1) for name, part in parts)
    return next(filter(None, reasons), None)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_path(value: Any) -> str | None:
    fits = isinstance(value, str) and value.strip() and "\0" not in value
    return None if fits else "the path of a model folder, or of a .gguf, .pt or .pth file"


def _is_file(value: Any) -> str | None:
    fits = isinstance(value, str) and value.strip() and "\0" not in value and "\\" not in value
    if fits and not value.startswith("/") and ".." not in PurePosixPath(value).parts:
        return None
    return "a path inside the repository or package, such as model.gguf"


def _is_stop(value: Any) -> str | None:
    values = value if isinstance(value, list) else [value]
    fits = len(values) <= 4 and all(isinstance(text, str) and text for text in values)
    return None if fits else "a string or a list of up to 4 strings"


def _are_aliases(value: Any) -> str | None:
    expected = "a list of ids"
    if not isinstance(value, list):
        return expected
    return expected if any(_is_name(alias) for alias in value) else None


def _is_generation(value: Any) -> str | None:
    if not isinstance(value, dict):
        return "an object with sampling fields"
    for key, fields in value.items():
        if key not in _GENERATION:
            return f"the fields {', '.join(_GENERATION)}, not {key}"
        if fields is not None and (expected := _GENERATION[key](fields)):
            return f"{expected} for {key}"
    return None


_is_name = _matches(_NAME, "letters, digits and ./:@+_- , at most 200, without ..")


def _is_embedding(value: Any) -> str | None:
    expected = (
        f"{', '.join(ENCODERS)}, or an object with pooling ({', '.join(_POOLINGS)}) and normalize"
    )
    if isinstance(value, dict):
        fits = value.get("pooling") in _POOLINGS and set(value) <= {"pooling", "normalize"}
        return None if fits and isinstance(value.get("normalize", True), bool) else expected
    return None if value in ENCODERS else expected


def _are_marks(value: Any) -> str | None:
    fits = isinstance(value, list) and len(value) == 2 and all(isinstance(m, str) for m in value)
    if fits and value[1] and max(map(len, value)) <= MAX_MARK and all(map(_is_text, value)):
        return None
    return f"a list of two texts of at most {MAX_MARK} characters, the second not empty"


def _is_mark(value: Any) -> str | None:
    fits = isinstance(value, str) and 0 < len(value) <= 256 and value.isprintable()
    return None if fits else "a text"


def _is_range(value: Any) -> str | None:
    expected = f"an object with min and max, whole numbers from 1 to {MOST_REPLICAS}"
    if not isinstance(value, dict) or not value or not set(value) <= {"min", "max"}:
        return expected
    if any(_whole(1, MOST_REPLICAS)(number) for number in value.values()):
        return expected
    least = value.get("min", 1)
    return None if least <= value.get("max", least) else f"{expected}, max not below min"


_GENERATION: dict[str, Check] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": _whole(0, 1 << 31),
    "min_p": _number(0, 1),
    "typical_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 10),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "max_tokens": _whole(1, 1 << 24),
    "min_tokens": _whole(0, 1 << 24),
    "stop": _is_stop,
    "seed": _whole(-(1 << 63), (1 << 63) - 1),
}

FIELDS: dict[str, Check] = {
    "name": _is_name,
    "aliases": _are_aliases,
    "hf_repo": _matches(REPO, "the id of a repository, such as openai-community/gpt2"),
    "revision": _matches(_REVISION, "a branch, tag or commit"),
    "file": _is_file,
    "path": _is_path,
    "adapter": lambda value: _is_path(value) and "the folder of an adapter, or its id on the Hub",
    "base": _is_name,
    "upstream": _is_upstream,
    "upstream_model": lambda value: _is_mark(value) and "the model's id there",
    "api_key_env": _matches(re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}"), "the name of a variable"),
    "timeout_s": _number(0.1, 3600),
    "package": _matches(_PACKAGE, "the name of an installed Python package"),
    "dtype": _one_of(_DTYPES),
    "quantization": _one_of(_QUANTIZATIONS),
    "device": _matches(_DEVICE, "auto, cpu, cuda, cuda:N or mps"),
    "max_context_tokens": _whole(8, 1 << 24),
    "chat": _one_of(_CHAT),
    "tools": _one_of(("template", "prompt")),
    "reasoning": _are_marks,
    "schema_hint": _is_bool,
    "embedding": _is_embedding,
    "token_encoding": _matches(_ENCODING, "an encoding of tiktoken, such as cl100k_base"),
    "generation": _is_generation,
    "is_instruct": _is_bool,
    "metadata": _is_metadata,
    "trust_remote_code": _is_bool,
    "replicas": _is_range,
}
