"""The operator's registry file (MODEL_REGISTRY_PATH): JSON or YAML in, model entries out."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers_api.config.environment import secret
from transformers_api.config.settings import SettingError
from transformers_api.serving.models.registry_fields import ENCODERS, FIELDS, REPO
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
    ReplicaRange,
    Source,
    UpstreamSource,
)

Entry = Mapping[str, Any]

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
    if unknown := sorted(str(key) for key in entry if key not in FIELDS):
        raise SettingError(
            f"{where}: {unknown[0]} is not a field; fields are {', '.join(sorted(FIELDS))}"
        )
    # null means default, and YAML reads a bare ``off`` as false
    fields = {key: value for key, value in entry.items() if value is not None}
    if "metadata" in fields:
        fields["metadata"] = _dated(fields["metadata"])
    if fields.get("chat") is False:
        fields["chat"] = "off"
    for key, value in fields.items():
        if expected := FIELDS[key](value):
            raise SettingError(
                f"{where}: {key} {_short(value)} is not allowed: expected {expected}"
            )
    if "name" not in fields:
        raise SettingError(f"{where}: name is missing")
    is_encoder = fields.get("embedding") in ENCODERS
    if is_encoder and fields.get("quantization", "auto") not in ("auto", "none"):
        raise SettingError(f"{where}: quantization is for models that generate, not for encoders")
    if is_encoder and "replicas" in fields:
        raise SettingError(f"{where}: replicas is for models that generate, not for encoders")
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
    if "replicas" in passed:
        least = passed["replicas"].get("min", 1)
        passed["replicas"] = ReplicaRange(least, passed["replicas"].get("max", least))
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
    if REPO.fullmatch(text) and "/" in text and not path.exists():
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
