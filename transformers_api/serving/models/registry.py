"""Which models may be served: built-in entries, the operator's file, and ids of the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from transformers_api.config.settings import SettingError, Settings
from transformers_api.errors import ModelNotFound
from transformers_api.serving.models.builtin import builtin_models
from transformers_api.serving.models.registry_file import read_registry_file
from transformers_api.serving.models.spec import AdapterEntry, HubSource, ModelSpec, PathSource

_NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def is_hub_id(text: str) -> bool:
    """True where ``text`` has the shape ``owner/name`` and cannot be taken for a path."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


def local_model(text: str) -> ModelSpec | None:
    """The entry for a path to a GGUF file or a model's folder; None for an id."""
    path = Path(text).expanduser()
    if path.suffix != ".gguf" and not (os.sep in text and path.is_dir()):
        return None
    stem = path.stem if path.suffix == ".gguf" else path.absolute().name
    name = _NO_NAME.sub("-", _PART.sub("", stem)).strip(".-") or "model"
    return ModelSpec(name=name, source=PathSource(path.absolute()))


class ModelRegistry:
    """Looks up ids. What it does not return never reaches the file system or the Hub.

    ``is_cached`` says whether a repository of the Hub lies complete on this machine.
    """

    def __init__(
        self,
        specs: Iterable[ModelSpec | AdapterEntry],
        allow_unregistered: bool,
        is_cached: Callable[[str], bool],
        allow_list: Sequence[str] = (),
    ) -> None:
        by_name = _with_bases({entry.name: entry for entry in specs})
        by_alias = {alias: spec for spec in by_name.values() for alias in spec.aliases}
        by_id = by_alias | by_name
        _check_aliases(by_name)
        if unknown := [name for name in allow_list if name not in by_id]:
            raise SettingError(
                f"MODEL_ALLOW_LIST={','.join(allow_list)} is not allowed: no registry entry is "
                f"called {', '.join(unknown)}"
            )
        allowed = {by_id[name].name for name in allow_list} or set(by_name)
        for name in allowed if allow_list else ():
            if (base := by_name[name].resident.name) not in allowed:
                raise SettingError(
                    f"MODEL_ALLOW_LIST={','.join(allow_list)} is not allowed: {base}, the base of "
                    f"{name}, must be in it too"
                )
        self._specs = [spec for name, spec in by_name.items() if name in allowed]
        self._by_id = {name: spec for name, spec in by_id.items() if spec.name in allowed}
        self._is_restricted = bool(allow_list)
        self._allow_unregistered = allow_unregistered
        self._is_cached = is_cached

    @classmethod
    def from_settings(
        cls, settings: Settings, is_cached: Callable[[str], bool] = lambda repo: False
    ) -> ModelRegistry:
        """Built-in entries, the file's, a path as DEFAULT_MODEL; the later of two with one name.

        Raises SettingError.
        """
        specs: list[ModelSpec | AdapterEntry] = []
        specs += builtin_models() if settings.include_default_models else ()
        if settings.model_registry_path is not None:
            specs += read_registry_file(settings.model_registry_path)
        is_elsewhere = settings.engine == "openai"  # nothing is loaded here
        if is_elsewhere:
            specs = [spec for spec in specs if isinstance(spec, ModelSpec) and spec.upstream]
        own = None if is_elsewhere else local_model(settings.default_model)
        registry = cls(
            [*specs, own] if own else specs,
            allow_unregistered=settings.downloads_allowed and not is_elsewhere,
            is_cached=(lambda _repo: False) if is_elsewhere else is_cached,
            allow_list=settings.model_allow_list,
        )
        if own and own.name in registry._by_id:
            registry._by_id[settings.default_model] = own
        return registry

    def list(self) -> list[ModelSpec]:
        """Every registered entry that may be served."""
        return list(self._specs)

    def resolve(self, model_id: str) -> ModelSpec:
        """The entry with this name or alias, or one for an id of the Hub.

        Raises ModelNotFound.
        """
        if spec := self._by_id.get(model_id):
            return spec
        if (
            not self._is_restricted
            and is_hub_id(model_id)
            and (self._allow_unregistered or self._is_cached(model_id))
        ):
            return ModelSpec(name=model_id, source=HubSource(model_id), registered=False)
        raise ModelNotFound(model_id)


def _with_bases(entries: Mapping[str, ModelSpec | AdapterEntry]) -> dict[str, ModelSpec]:
    """All entries, adapters with their bases. Raises SettingError for one that has none."""
    models = {name: e for name, e in entries.items() if isinstance(e, ModelSpec)}
    by_id = {alias: spec for spec in models.values() for alias in spec.aliases} | models
    specs: dict[str, ModelSpec] = {}
    for name, entry in entries.items():
        if isinstance(entry, ModelSpec):
            specs[name] = entry
            continue
        base = by_id.get(entry.base)
        if base is None and entry.base not in entries and is_hub_id(entry.base):
            base = ModelSpec(name=entry.base, source=HubSource(entry.base), registered=False)
        if base is None or base.encoder or base.upstream:
            reason = "an entry for a model that generates, or an id of the Hub"
            raise SettingError(
                f"Registry entry {name}: base {entry.base!r} is not allowed: expected {reason}"
            )
        specs[name] = entry.on(base)
    return specs


def _check_aliases(by_name: Mapping[str, ModelSpec]) -> None:
    earlier: set[str] = set()
    for name, spec in by_name.items():
        if taken := earlier.intersection(spec.aliases):
            raise SettingError(
                f"Registry entry {name}: aliases {taken.pop()!r} is not allowed: it is the name "
                "of another entry"
            )
        earlier.add(name)
