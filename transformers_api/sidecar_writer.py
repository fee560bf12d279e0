"""Sidecars of GGUF models, made in the server's own process: what it needs is imported anyway."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers_api.engine.thread import EngineThread
from transformers_api.serving.models.hub import Progress
from transformers_api.serving.models.store import WriteSidecar


def sidecar_writer(thread: EngineThread) -> WriteSidecar:
    """The function for ModelStore: it works in the caller's thread, torch's part in another."""

    def shapes(config: Any) -> Mapping[str, tuple[int, ...]]:
        def work() -> Mapping[str, tuple[int, ...]]:
            from transformers_api.checkpoints.parameter_shapes import parameter_shapes

            return parameter_shapes(config)

        return thread.call(work).result()

    def write(source: Path, folder: Path, progress: Progress, warn: Callable[[str], None]) -> None:
        thread.call(_import_transformers).result()
        from transformers_api.checkpoints.sidecar import write_sidecar

        write_sidecar(source, folder, progress, warn, shapes)

    return write


def _import_transformers() -> None:
    from transformers_api import families

    families.register()
