"""The operator's registry file (MODEL_REGISTRY_PATH): JSON or YAML in, model entries out."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, get_args
from urllib.parse import urlsplit

from transformers_api.config.environment import secret
from transformers_api.config.settings import SettingError
from transformers_api.serving.models.registry_text import MAX_NESTING, parse_registry
from transformers_api.serving.models.spec import (
    UPSTREAM_TIMEOUT_S,
    AdapterEntry,
    AdapterFiles,
    HubSource,
    ModelSpec,
    PackageSource,
    PathSource,
    Pooling,
    PoolingMode,
    Source,
    UpstreamSource,
)

Entry = Mapping[str, Any]
Check = Callable[[Any], str | None]  # what would be allowed, or None when the value is

_NAME = re.compile(r"[A-Za-z0-9][\w./:@+ -]{0,199}", re.ASCII)
_REPO = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)
_PACKAGE = re.compile(r"[A-Za-z0-9][\w.-]{0,199}", re.ASCII)
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?", re.ASCII)
_ENCODING = re.compile(r"[a-z0-9_]{1,40}", re.ASCII)
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_QUANTIZATIONS = ("auto", "stored", "gguf", "none", "int8", "int4")
_CHAT = ("template", "transcript", "off")
MAX_MARK = 100  # characters
_ENCODERS = ("encoder", "cross_encoder")
_POOLINGS = get_args(PoolingMode)
_SOURCES = ("hf_repo", "path", "package", "upstream")
_OF_UPSTREAMS = ("upstream_model", "api_key_env", "timeout_s")
# What an entry with an upstream may say besides: all else is that server's own.
_BESIDE_UPSTREAMS = (
    *("name", "aliases", "upstream", "max_context_tokens", "generation", "metadata", "chat"),
    "is_instruct",
)
# What an adapter's entry may say; all else is its base's.
_OF_ADAPTERS = (
    *("name", "aliases", "adapter", "base", "revision", "chat", "tools", "reasoning"),
    *("schema_hint", "generation", "is_instruct", "metadata"),
)


def read_registry_file(path: Path) -> list[ModelSpec | AdapterEntry]:
    """The entries of a registry file. SettingError names file, entry, field and what is allowed."""
    entries = parse_registry(path)
    if isinstance(entries, dict) and set(entries) == {"models"}:
        entries = entries["models"]
    if not isinstance(entries, list):
        raise SettingError(f'{path}: expected a list of entries, or {{"models": [...]}}')
    specs: list[ModelSpec | AdapterEntry] = []
    for number, entry in enumerate(entries, start=1):
        where = f"{path}: entry {number}"
        if not isinstance(entry, dict):
            raise SettingError(f"{where}: expected an object with name and source")
        if isinstance(entry.get("name"), str):
            where += f" ({entry['name']})"
        specs.append(_spec(entry, where, path.parent))
    _check_names(specs, path)
    return specs


def _check_names(specs: list[ModelSpec | AdapterEntry], path: Path) -> None:
    entries: dict[str, str] = {}
    for number, spec in enumerate(specs, start=1):
        for field, name in (("name", spec.name), *(("aliases", alias) for alias in spec.aliases)):
            if name in entries:
                raise SettingError(
                    f"{path}: entry {number} ({spec.name}): {field} {name!r} is not allowed: "
                    f"entry {entries[name]} has it already"
                )
            entries[name] = f"{number} ({spec.name})"


def _spec(entry: Entry, where: str, base: Path) -> ModelSpec | AdapterEntry:
    if unknown := sorted(str(key) for key in entry if key not in _FIELDS):
        raise SettingError(
            f"{where}: {unknown[0]} is not a field; fields are {', '.join(sorted(_FIELDS))}"
        )
    # null means default, and YAML reads a bare ``off`` as false
    fields = {key: value for key, value in entry.items() if value is not None}
    if "metadata" in fields:
        fields["metadata"] = _dated(fields["metadata"])
    if fields.get("chat") is False:
        fields["chat"] = "off"
    for key, value in fields.items():
        if expected := _FIELDS[key](value):
            raise SettingError(
                f"{where}: {key} {_short(value)} is not allowed: expected {expected}"
            )
    if "name" not in fields:
        raise SettingError(f"{where}: name is missing")
    is_encoder = fields.get("embedding") in _ENCODERS
    if is_encoder and fields.get("quantization", "auto") not in ("auto", "none"):
        raise SettingError(f"{where}: quantization is for models that generate, not for encoders")
    if "adapter" in fields or "base" in fields:
        return _adapter(fields, where, base)
    return ModelSpec(
        **_passed(fields),
        source=_source(fields, where, base),
        aliases=tuple(fields.get("aliases", ())),
    )


def _passed(fields: Entry) -> dict[str, Any]:
    """The fields that ModelSpec has in the same words."""
    passed = {
        key: value
        for key, value in fields.items()
        if key not in (*_SOURCES, *_OF_UPSTREAMS, "revision", "file", "aliases", "adapter", "base")
    }
    if "reasoning" in passed:
        passed["reasoning"] = tuple(passed["reasoning"])
    if isinstance(passed.get("embedding"), dict):
        pooling = passed["embedding"]
        passed["embedding"] = Pooling(pooling["pooling"], pooling.get("normalize", True))
    return passed


def _adapter(fields: Entry, where: str, folder: Path) -> AdapterEntry:
    for key, other in (("adapter", "base"), ("base", "adapter")):
        if key not in fields:
            raise SettingError(f"{where}: {key} is missing; {other} needs it")
    if others := [key for key in fields if key not in _OF_ADAPTERS]:
        raise SettingError(f"{where}: {others[0]} is its base's to say, not an adapter's")
    text = fields["adapter"]
    path = folder / Path(text).expanduser()
    files: AdapterFiles = PathSource(path)
    if _REPO.fullmatch(text) and "/" in text and not path.exists():
        files = HubSource(text, fields.get("revision"))
    elif "revision" in fields:
        raise SettingError(f"{where}: revision belongs to an adapter of the Hub only")
    passed = _passed(fields)
    return AdapterEntry(
        name=passed.pop("name"),
        files=files,
        base=fields["base"],
        aliases=tuple(fields.get("aliases", ())),
        fields=passed,
    )


def _source(entry: Entry, where: str, base: Path) -> Source:
    named = [key for key in _SOURCES if key in entry]
    if len(named) != 1:
        count = f"{' and '.join(named)} are" if named else "none is"
        raise SettingError(
            f"{where}: one of hf_repo, path, package or upstream is needed, {count} given"
        )
    kind = named[0]
    if kind == "upstream":
        return _upstream(entry, where)
    if others := [key for key in _OF_UPSTREAMS if key in entry]:
        raise SettingError(f"{where}: {others[0]} belongs to upstream only")
    if "revision" in entry and kind != "hf_repo":
        raise SettingError(f"{where}: revision belongs to hf_repo only")
    if kind == "path":
        if "file" in entry:
            raise SettingError(f"{where}: file belongs to hf_repo or package; put it into path")
        return PathSource(base / Path(entry["path"]).expanduser())
    if kind == "package":
        if "file" not in entry:
            raise SettingError(f"{where}: file is missing; package needs it")
        return PackageSource(entry["package"], entry["file"])
    return HubSource(entry["hf_repo"], entry.get("revision"), entry.get("file"))


def _upstream(entry: Entry, where: str) -> UpstreamSource:
    if others := [key for key in entry if key not in (*_OF_UPSTREAMS, *_BESIDE_UPSTREAMS)]:
        raise SettingError(f"{where}: {others[0]} is the upstream's own to say")
    variable = entry.get("api_key_env")
    if variable is not None and not secret(variable):
        raise SettingError(f"{where}: api_key_env: the environment has no {variable}")
    return UpstreamSource(
        entry["upstream"].rstrip("/"),
        entry.get("upstream_model", entry["name"]),
        variable,
        float(entry.get("timeout_s", UPSTREAM_TIMEOUT_S)),
    )


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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _dated(value: Any, depth: int = 0) -> Any:
    """``value`` with YAML's dates as the text that they were written as, in ISO's form."""
    if isinstance(value, (datetime.date, datetime.datetime)):
        return value.isoformat()
    if depth > MAX_NESTING:
        return value
    if isinstance(value, dict):
        return {key: _dated(part, depth + 1) for key, part in value.items()}
    return [_dated(part, depth + 1) for part in value] if isinstance(value, list) else value


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
        f"{', '.join(_ENCODERS)}, or an object with pooling ({', '.join(_POOLINGS)}) and normalize"
    )
    if isinstance(value, dict):
        fits = value.get("pooling") in _POOLINGS and set(value) <= {"pooling", "normalize"}
        return None if fits and isinstance(value.get("normalize", True), bool) else expected
    return None if value in _ENCODERS else expected


def _are_marks(value: Any) -> str | None:
    fits = isinstance(value, list) and len(value) == 2 and all(isinstance(m, str) for m in value)
    if fits and value[1] and max(map(len, value)) <= MAX_MARK and all(map(_is_text, value)):
        return None
    return f"a list of two texts of at most {MAX_MARK} characters, the second not empty"


def _is_mark(value: Any) -> str | None:
    fits = isinstance(value, str) and 0 < len(value) <= 256 and value.isprintable()
    return None if fits else "a text"


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

_FIELDS: dict[str, Check] = {
    "name": _is_name,
    "aliases": _are_aliases,
    "hf_repo": _matches(_REPO, "the id of a repository, such as openai-community/gpt2"),
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
}
