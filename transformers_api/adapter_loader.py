"""The part of the model loader that is about adapters: their files, and the base with one."""

from __future__ import annotations

from collections.abc import Callable

from transformers_api.engine.adapter_source import AdapterSource
from transformers_api.engine.base import EngineListener
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.models.store import ModelStore
from transformers_api.serving.swap.loaded_model import AdaptedModel, LoadedModel, PreparedAdapter


class AdapterLoader:
    """Meets ``serving.swap.Loader`` as far as adapters go.

    ``listen`` gives the listener to the sequences of the adapter with that name.
    """

    def __init__(self, store: ModelStore, listen: Callable[[str], EngineListener | None]) -> None:
        self.store = store
        self._listen = listen
        self._prepared: dict[str, PreparedAdapter] = {}  # of registered entries, which are few

    def prepare_adapter(
        self, spec: ModelSpec, progress: Callable[[float, str], None]
    ) -> PreparedAdapter:
        """See Loader."""
        made = self.store.prepare_adapter(spec, progress)
        self._prepared[spec.name] = made
        return made

    def find_adapter(self, spec: ModelSpec) -> PreparedAdapter | None:
        """See Loader."""
        made = self._prepared.get(spec.name)
        is_same = made is not None and made[0].stamp == self.store.adapters.stamp(spec)
        return made if is_same else None

    def adapt(
        self,
        model: LoadedModel,
        spec: ModelSpec,
        source: AdapterSource,
        *,
        timeout: float | None = None,
        is_cancelled: Callable[[], bool] = bool,
    ) -> LoadedModel:
        """See Loader."""
        listener = self._listen(spec.name)
        engine = model.engine.adapted(
            source, listener=listener, timeout=timeout, is_cancelled=is_cancelled
        )
        return AdaptedModel.of(model, spec, engine, source.stamp)
