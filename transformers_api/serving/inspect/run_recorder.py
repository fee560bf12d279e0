"""Runs of an answer that is being written: its notes become a Run of each choice at its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from transformers_api.engine.base import TokenOutput
from transformers_api.inspection.activations import RecordedRows
from transformers_api.inspection.base import StepTrace
from transformers_api.serving.generation import Generation, GenerationRequest
from transformers_api.serving.inspect import run_params
from transformers_api.serving.inspect.run_file import Json, Run, joined
from transformers_api.serving.seeds import with_seed
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text.choice_text import TextDelta


@dataclass(slots=True)
class _Notes:
    text: str = ""
    finish_reason: str = ""
    steps: list[StepTrace] = field(default_factory=list)
    rows: list[RecordedRows] = field(default_factory=list)


class RunRecorder:
    """Hears every piece of one generation; ``describe`` writes a step of a choice as JSON."""

    def __init__(
        self,
        model: LoadedModel,
        request: GenerationRequest,
        describe: Callable[[StepTrace, int], Json],
    ) -> None:
        self._model = model
        self._request = request
        self._describe = describe
        self._notes: dict[int, _Notes] = {}

    def take(self, delta: TextDelta, output: TokenOutput) -> None:
        """Note a piece and what came with it."""
        notes = self._notes.setdefault(delta.index, _Notes())
        notes.text += delta.text
        notes.finish_reason = delta.finish_reason or notes.finish_reason
        trace: StepTrace | None = output.extras.get("trace")
        if trace is not None:
            notes.rows += trace.recorded
            notes.steps.append(replace(trace, recorded=()))

    def runs(self, generation: Generation) -> list[Run]:
        """A run of each choice of a complete answer."""
        return [self._run(index, generation) for index in range(len(generation.choices))]

    def _run(self, index: int, generation: Generation) -> Run:
        request, notes = self._request, self._notes.get(index, _Notes())
        prompt, place = divmod(index, request.per_prompt)
        intervene = request.intervene
        ids = tuple(generation.choices[index].token_ids)
        assert request.run is not None
        decoded = self._model.vocabulary.decoded
        return Run(
            id=run_id(request.run, index, len(generation.choices)),
            created=int(time.time()),
            model=self._model.spec.name,
            fingerprint=self._model.fingerprint,
            prompt_ids=tuple(request.prompts[prompt]),
            token_ids=ids,
            prompt_tokens=[decoded(token_id) for token_id in request.prompts[prompt]],
            tokens=[decoded(token_id) for token_id in ids],
            text=notes.text,
            finish_reason=notes.finish_reason,
            params=run_params.to_json(with_seed(request.params, place)),
            stop=request.stop,
            intervene=None if intervene is None else intervene.source,
            edits=request.edits[prompt].described if request.edits else (),
            spans=[asdict(span) for span in request.spans()] if intervene is not None else [],
            can_replay=request.constrain is None,
            steps=[self._describe(step, index) for step in notes.steps[: len(ids)]],
            parts=joined(notes.rows),
        )


def run_id(run: str, index: int, choices: int) -> str:
    """The id of a choice's run."""
    return run if choices == 1 else f"{run}-{index}"
