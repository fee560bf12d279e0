"""Edited answers read again by the unedited model: how far the edits push each token.

A twin that reads along. It follows when the answer is complete, as one question about its tokens,
read in slices between the steps of those who are being answered; both predictions are computed in
the same way, so that nothing but the edits makes them differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers_api.errors import InvalidRequest
from transformers_api.inspection import questions
from transformers_api.inspection.divergence_question import DivergenceQuestion
from transformers_api.serving.generation import Generation, GenerationRequest
from transformers_api.serving.inspect.edit_positions import PromptPlaces
from transformers_api.serving.inspect.queue import Inspections
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.swap.loaded_model import LoadedModel

TOP = 3  # likely tokens of the unedited model


def check_comparable(
    request: GenerationRequest, window: int, prompts: Sequence[PromptPlaces]
) -> None:
    """Raise InvalidRequest for what cannot be compared with an unedited twin."""
    reason = None
    if request.params.prompt_logprobs is not None:
        reason = "cannot go with scores of the prompt (prompt_logprobs, or echo with logprobs)"
    elif request.per_prompt > request.n:
        reason = "cannot go with best_of above n"
    elif any(prompt.window is not None for prompt in prompts):
        room = window - max(prompt.length for prompt in prompts)
        reason = f"needs prompt and answer within the model's window; use max_tokens <= {room}"
    if reason is not None:
        name = f"{request.intervene.name if request.intervene else 'intervene'}.compare"
        raise InvalidRequest(f"{name} {reason}", param=name)


def with_twins(request: GenerationRequest) -> GenerationRequest:
    """``request`` with an unedited answer for each one, of the same seed. Raises InvalidRequest."""
    assert request.intervene is not None
    reason = None
    if request.per_prompt > request.n:
        reason = "cannot go with best_of above n"
    elif request.stores:
        reason = "cannot go with store; keep a run of each instead"
    if reason is not None:
        name = f"{request.intervene.name}.compare"
        raise InvalidRequest(f"{name} {reason}", param=name)
    twins = replace(request.params, prompt_logprobs=None)
    return replace(request, n=2 * request.n, best_of=None, twins=twins)


def compare(
    model: LoadedModel,
    generation: Generation,
    inspections: Inspections,
    cancellation: Cancellation,
) -> None:
    """Fill ``generation.comparisons``, whose answers are complete.

    Raises what ``Inspections.run`` does, but for InspectionBusy and InspectionTimeout.
    """
    request = generation.request

    def question(index: int, answer: Sequence[int]) -> questions.Divergence:
        prompt = index // request.per_prompt
        plan = request.edits[prompt].plan
        compared = DivergenceQuestion(answer=tuple(answer), plan=plan, topk=TOP)
        return questions.Divergence(request.prompts[prompt], compared)

    generation.comparisons = [
        inspections.ask(model, question(choice.index, choice.token_ids), cancellation)
        for choice in generation.choices
    ]
