"""The attachment of inspection to an engine when a model is loaded."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from transformers_api.engine.backend import Backend
from transformers_api.engine.llm_engine import BatchingEngine, EngineLimits
from transformers_api.engine.runners.model_runner import Runner
from transformers_api.engine.sampling.sampler import TokenSampler
from transformers_api.inspection.edits import InterveningRunner, InterveningSampler
from transformers_api.inspection.examination import Examined, examine
from transformers_api.inspection.examination_file import ExaminationStore
from transformers_api.inspection.inspector import ModelInspector
from transformers_api.inspection.places import ActingCheck
from transformers_api.inspection.trace import TracingRunner, TracingSampler

# By the model, which may have been on standby: the sizes it was examined with, and the result.
Examinations = WeakKeyDictionary[Any, tuple[dict[str, int], Examined]]


class Attachment:
    """One per load; all of it on the engine thread.

    ``slice_tokens``: tokens that an inspection reads between two decode steps. ``examinations``
    is filled and read: a model is examined once in the life of whoever owns it. ``store``: see
    ``ExaminationStore``; None: of all others each is examined.
    """

    def __init__(
        self,
        slice_tokens: int,
        examinations: Examinations | None = None,
        store: ExaminationStore | None = None,
    ) -> None:
        self.slice_tokens, self._store = slice_tokens, store
        self._examinations = Examinations() if examinations is None else examinations
        self.examined: Examined | None = None
        self._backend: Backend | None = None

    def wrap(
        self,
        model: Any,
        limits: EngineLimits,
        backend: Backend,
        runner: Runner,
        sampler: TokenSampler,
    ) -> tuple[Runner, TokenSampler]:
        """See ``engine.loader.Wrap``."""
        sizes = {"vocab_size": limits.vocab_size, "context": limits.max_model_len}
        before, examined = self._examinations.get(model, (None, None))
        if examined is None or before != sizes:
            examined = self._examine(model, sizes, backend, runner)
            self._examinations[model] = sizes, examined
        self.examined, self._backend = examined, backend
        tracing = TracingRunner(runner, model, examined, backend)
        # Outside of it: what is traced is what was edited.
        runner = InterveningRunner(
            *(tracing, model, backend, examined.parts),
            *(examined.anatomy.attention, examined.source),
        )
        sampler = InterveningSampler(sampler, runner)
        return runner, TracingSampler(sampler, model, examined, backend)

    def _examine(
        self, model: Any, sizes: dict[str, int], backend: Backend, runner: Runner
    ) -> Examined:
        store = self._store
        file = store.file(model, sizes, backend, runner) if store else None
        if file is not None and (stored := file.read()) is not None:
            return stored
        examined = examine(model, **sizes, backend=backend, runner=runner)
        if file is not None:
            file.write(examined)
        return examined

    def inspector(self, engine: BatchingEngine) -> ModelInspector:
        """Return the inspector of a model, which keeps no model alive."""
        examined, backend = self.examined, self._backend
        assert examined is not None
        assert backend is not None
        anatomy, source = examined.anatomy, examined.source
        check = ActingCheck(engine, backend, examined.parts, anatomy.attention, source)
        return ModelInspector(
            anatomy,
            examined.parts,
            source,
            check,
            slice_tokens=self.slice_tokens,
            reads_in_chunks=engine.describe().in_pieces,
        )
