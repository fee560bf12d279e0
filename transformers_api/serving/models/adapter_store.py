"""Makes adapters complete on this machine's disk: in place, or from the Hub."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

from transformers_api.config.settings import Settings
from transformers_api.engine.adapter_source import AdapterSource
from transformers_api.serving.models.adapter_files import (
    adapter_stamp,
    check_adapter_config,
    inspect_adapter,
    is_whole_adapter,
    weight_bytes,
)
from transformers_api.serving.models.hub import HubCache, Progress, check_download
from transformers_api.serving.models.spec import HubSource, ModelSpec, PathSource


class AdapterStore:
    """Knows where every adapter lies. Safe from any thread."""

    def __init__(self, hub: HubCache, settings: Settings) -> None:
        self._hub = hub
        self._may_download = settings.downloads_allowed
        self._most_bytes = settings.max_adapters_mb << 20

    def locate(self, spec: ModelSpec) -> Path | None:
        """The folder of an adapter that is complete on the disk. No network."""
        if isinstance(spec.adapter, HubSource):
            return self._hub.adapter(spec.adapter)
        folder = spec.adapter.path.absolute() if spec.adapter else None
        return folder if folder and is_whole_adapter(folder) else None

    def stamp(self, spec: ModelSpec) -> Hashable:
        """Another value when a file of an adapter has changed; None: it is not whole."""
        folder = self.locate(spec)
        try:
            return None if folder is None else adapter_stamp(folder)
        except OSError:
            return None

    def size(self, spec: ModelSpec) -> int | None:
        """Bytes of an adapter's numbers as they are stored; None where it is not here."""
        folder = self.locate(spec)
        return None if folder is None else weight_bytes(folder)

    def check_source(self, spec: ModelSpec) -> None:
        """Raise ModelLoadFailed where ``prepare`` cannot succeed, as far as is known without it."""
        if isinstance(spec.adapter, PathSource):
            inspect_adapter(spec.adapter.path.absolute(), spec.name, self._most_bytes)
        elif spec.adapter is not None and self.locate(spec) is None:
            check_download(spec.adapter, self._may_download)

    def prepare(
        self, spec: ModelSpec, progress: Progress
    ) -> tuple[AdapterSource, dict[str, tuple[int, int]]]:
        """Fetch what is missing and check it; see ``inspect_adapter``.

        Raises ModelLoadFailed, InsufficientStorage, InsufficientMemory.
        """
        assert spec.adapter is not None
        if isinstance(spec.adapter, PathSource):
            return inspect_adapter(spec.adapter.path.absolute(), spec.name, self._most_bytes)
        folder = self.locate(spec)
        if folder is None:
            check_download(spec.adapter, self._may_download)
            folder = self._hub.fetch(
                spec.adapter, progress, is_adapter=True, check=check_adapter_config
            )
        return inspect_adapter(folder, spec.name, self._most_bytes)
