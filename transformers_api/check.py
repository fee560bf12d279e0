"""``check``: the settings, the machine, and what would keep the server from serving."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TextIO

from transformers_api.config.described import described
from transformers_api.config.settings import SettingError, Settings
from transformers_api.engine.load_options import AS_NUMBERS
from transformers_api.engine.native import installation
from transformers_api.errors import ApiError
from transformers_api.serving.limits.access import key_store
from transformers_api.serving.limits.api_keys import reason
from transformers_api.serving.models.capabilities import FileFacts, capabilities, read_facts
from transformers_api.serving.models.registry import ModelRegistry
from transformers_api.serving.models.sidecars import is_sidecar, read_stored_tensors
from transformers_api.serving.models.spec import HubSource, ModelSpec
from transformers_api.serving.models.store import ModelStore
from transformers_api.serving.models.weight_fidelity import weight_fidelity

NEEDED_VERSIONS = {"torch": (2, 13), "transformers": (5, 23)}
NEEDED_PYTHON = (3, 11)
LOW_MEMORY_BYTES = 1 << 30
LOW_DISK_BYTES = 2 << 30
PREVENTED = "mend that, or set DEFAULT_MODEL or PRELOAD_MODEL=false"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report; ``mend`` says what to do where something is wrong."""

    subject: str
    state: str
    mend: str | None = None
    prevents: bool = True  # whether the server cannot serve before it is mended


def report(out: TextIO, model: str | None = None) -> int:
    """Write everything, for ``model`` as the default; 1 when something prevents serving."""
    try:
        settings = Settings.from_env()
        settings = settings if model is None else replace(settings, default_model=model)
    except SettingError as error:
        out.write(f"WRONG  {error}\n")
        return 1
    out.write("Settings\n")
    _write_settings(settings, out)
    out.write("\nEnvironment\n")
    findings = list(_findings(settings))
    for finding in findings:
        mark = "ok" if finding.mend is None else "WRONG" if finding.prevents else "note"
        out.write(f"  {mark:<5}  {finding.subject}: {finding.state}\n")
        if finding.mend:
            out.write(f"         {finding.mend}\n")
    wrong = sum(finding.mend is not None and finding.prevents for finding in findings)
    out.write(f"\n{wrong} of these prevent serving\n" if wrong else "\nReady to serve\n")
    return 1 if wrong else 0


def _write_settings(settings: Settings, out: TextIO) -> None:
    standard = Settings()
    names = {name: aliases for name, _, aliases, _ in described()}
    width = max(map(len, names))
    for option in fields(Settings):
        name, value = option.name.upper(), getattr(settings, option.name)
        is_standard = value == getattr(standard, option.name)
        alias = f" or {names[name]}" if names[name] else ""
        origin = "default" if is_standard else f"environment: {name}{alias}"
        text = _text(value) if option.repr or value is None else "***"
        out.write(f"  {name:<{width}}  {text}  ({origin})\n")


def _text(value: Any) -> str:
    if value is None or value == ():
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _findings(settings: Settings) -> Iterator[Finding]:
    yield from _software()
    yield _memory()
    yield _disk("MODEL_STORE", settings.model_store)
    yield _disk("HF_HUB_CACHE" if settings.hf_hub_cache else "HF_HOME", settings.hub_cache)
    yield _model(settings)
    yield _kernels(settings)
    yield _address(settings)
    yield _access(settings)


def _software() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    fits = sys.version_info[:2] >= NEEDED_PYTHON
    yield Finding("Python", python, None if fits else "install Python 3.11 or newer")
    for package, needed in NEEDED_VERSIONS.items():
        required = ".".join(map(str, needed))
        mend = f"pip install -r requirements.txt ({package} {required} or newer is needed)"
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, "not installed", mend)
            continue
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        yield Finding(package, version, None if numbers >= needed else mend)


def _memory() -> Finding:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass  # not Linux: the free pages have to do
    state = f"{free / 1e9:.1f} GB free"
    if free >= LOW_MEMORY_BYTES:
        return Finding("Memory", state)
    return Finding("Memory", state, "end other programs, or serve a smaller model", prevents=False)


def _disk(name: str, folder: Path) -> Finding:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    subject = f"{name} {folder}"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding(subject, f"{existing} cannot be written", f"set {name} to another folder")
    free = shutil.disk_usage(existing).free
    state = f"writable, {free / 1e9:.1f} GB free"
    if free >= LOW_DISK_BYTES:
        return Finding(subject, state)
    return Finding(subject, state, f"make room, or set {name} elsewhere", prevents=False)


def _model(settings: Settings) -> Finding:
    store = ModelStore(settings)
    subject = f"Default model {settings.default_model}"
    try:
        spec = ModelRegistry.from_settings(settings, store.has_repo).resolve(settings.default_model)
    except SettingError as error:
        return Finding("Model registry", str(error), "correct it")
    except ApiError as error:
        mend = "set DEFAULT_MODEL to an id that the models command lists, or PRELOAD_MODEL=false"
        return Finding(subject, str(error), mend, prevents=settings.preload_model)
    if spec.upstream is not None:
        return Finding(subject, f"an upstream answers for it: {spec.upstream.url}")
    if reason := store.refusal(spec):
        return Finding(subject, reason, PREVENTED, prevents=settings.preload_model)
    if folder := store.locate(spec):
        if spec.adapter is not None:
            try:
                store.prepare_adapter(spec, lambda _share, _what: None)
            except ApiError as error:
                return Finding(subject, str(error), PREVENTED, prevents=settings.preload_model)
        abilities = _abilities(settings, store, spec)
        weights = _weights(settings, spec, folder)
        return Finding(subject, f"ready in {folder}, for {abilities}{weights}")
    try:
        store.check_files(spec)
    except ApiError as error:
        return Finding(subject, str(error), PREVENTED, prevents=settings.preload_model)
    what = "be downloaded" if isinstance(spec.source, HubSource) else "be converted"
    return Finding(subject, f"will {what} when it is first loaded")


def _weights(settings: Settings, spec: ModelSpec, folder: Path) -> str:
    """The exactness of each type of a GGUF file on the native kernels; empty without one."""
    if not is_sidecar(folder):
        return ""
    types, requested = read_stored_tensors(folder).types, spec.quantization or settings.quantization
    is_small = sum(types.values()) < AS_NUMBERS
    if requested == "none" or (requested == "auto" and is_small):
        return "; its weights become plain numbers"
    quantization = "gguf" if requested == "auto" else requested
    fidelity = weight_fidelity(types, quantization, "bfloat16")
    return "; weights: " + ", ".join(f"{name} {text}" for name, text in fidelity.items())


def _abilities(settings: Settings, store: ModelStore, spec: ModelSpec) -> str:
    """Its capabilities by its entry and small files; /v1/models/{id} asks its tokenizer, too."""
    folder = store.locate(spec)
    names = capabilities(
        spec,
        FileFacts() if folder is None else read_facts(folder),
        refused=store.refusal(spec) is not None,
        embeds=settings.enable_embeddings_backend,
        inspects=settings.inspect_enabled,
    )
    return ", ".join(names) or "nothing"


def _kernels(settings: Settings) -> Finding:
    subject = "Native kernels"
    if not settings.native_kernels:
        return Finding(subject, "off")
    isa = settings.native_isa
    if reason := installation.unusable(isa):
        return Finding(subject, f"none, {reason}")
    cache, when = settings.native_cache, "when a model is first loaded"
    if cache.is_dir() and (reason := installation.untrusted(cache)):
        mend = f"let nobody but this user or root write to {cache}, or change NATIVE_CACHE"
        return Finding(subject, reason, mend, prevents=False)
    if library := installation.find(cache, isa):
        reason = installation.refusal(library)
        if reason is None:
            name = installation.instruction_set(isa)
            if isa == "auto" and (better := installation.withheld()):
                name += f" ({better})"
            return Finding(subject, f"{name}, ready in {library}")
        when = f"anew {when}: {reason}"
    if reason := installation.missing_compiler():
        mend = "install g++; without it inference is slower"
        return Finding(subject, reason, mend, prevents=False)
    return Finding(subject, f"will be compiled {when}")


def _address(settings: Settings) -> Finding:
    subject = f"Address {settings.host}:{settings.port}"
    host = settings.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, settings.port))
        except OSError as error:
            mend = "end the program that listens there, or set HOST and PORT"
            return Finding(subject, error.strerror or str(error), mend)
    return Finding(subject, "free")


def _access(settings: Settings) -> Finding:
    subject = "Access"
    store = key_store(settings)
    if store is not None:
        try:
            keys = store.read()
        except (OSError, ValueError) as error:
            if settings.api_keys_redis:
                return Finding(subject, reason(error), "see REDIS_URL, and what `keys list` says")
            state = f"API_KEYS_FILE {settings.api_keys_file}: {error}"
            return Finding(subject, state, "correct it, or make one with `keys add NAME`")
        if keys:
            return Finding(subject, f"with one of {len(keys)} API keys")
        return Finding(subject, "no API key, so that nobody may", "add one with `keys add NAME`")
    if settings.listens_on_loopback:
        return Finding(subject, "everybody on this machine")
    mend = "make keys with `keys add NAME` and set API_KEYS_FILE, or set HOST=127.0.0.1"
    return Finding(subject, "EVERYBODY who reaches this address", mend, prevents=False)
