"""The field ``branch``: an answer goes another way from one of its tokens on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import flask
from marshmallow import post_load

from transformers_api.api.http.fields import MAX_TOKEN_ID, Integer, StrictSchema, Text
from transformers_api.api.http.sampling_schema import MAX_N, about
from transformers_api.api.http.services import services
from transformers_api.errors import InvalidRequest
from transformers_api.serving.generation import GenerationRequest
from transformers_api.serving.swap.loaded_model import LoadedModel


@dataclass(frozen=True, slots=True)
class BranchRequest:
    """A token in the place of the ``step``-th one of a completion that was written."""

    completion_id: str
    choice: int
    step: int
    token_id: int


class BranchOptions(StrictSchema):
    """A completion, and where to leave it."""

    completion_id = Text(
        required=True, shortest=1, longest=256, **about("Id of an answer of yours.")
    )
    choice = Integer(0, MAX_N - 1, load_default=0, **about("Which of its choices."))
    step = Integer(
        0, MAX_TOKEN_ID, required=True, **about("So many of its tokens stay, from the first on.")
    )
    token_id = Integer(0, MAX_TOKEN_ID, required=True, **about("The token that comes then."))

    @post_load
    def make(self, data: dict[str, Any], **_: Any) -> BranchRequest:
        """The fields as one thing."""
        return BranchRequest(**data)


def branch_ids(body: Mapping[str, Any], model: LoadedModel) -> list[int] | None:
    """The tokens that are read for a body's ``branch``; None where it has none.

    Raises UnknownCompletion for one that is not there or somebody else's, and InvalidRequest.
    """
    branch: BranchRequest | None = body.get("branch")
    if branch is None:
        return None
    completion = services().completions.find(
        branch.completion_id, branch.choice, owner=flask.g.client, param="branch.completion_id"
    )
    if completion.model != model.spec.name:
        raise InvalidRequest(
            f"branch.completion_id is of model '{completion.model}'", param="model"
        )
    count = len(completion.token_ids)
    if branch.step > count:
        raise InvalidRequest(f"branch.step must be in [0, {count}]", param="branch.step")
    if branch.token_id >= (size := model.engine.vocab_size):
        raise InvalidRequest(f"branch.token_id must be below {size}", param="branch.token_id")
    return [*completion.prompt_ids, *completion.token_ids[: branch.step]]


def with_branch(request: GenerationRequest, body: Mapping[str, Any]) -> GenerationRequest:
    """``request``, whose answers begin with the token of a body's ``branch``."""
    branch: BranchRequest | None = body.get("branch")
    if branch is None:
        return request
    if request.constrain is not None:
        raise InvalidRequest("branch cannot go with a form or tools", param="branch")
    if request.params.prompt_logprobs is not None:
        raise InvalidRequest("branch cannot go with scores of the prompt", param="branch")
    return replace(request, params=replace(request.params, forced={0: branch.token_id}))
