"""Reading token streams in tests."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from transformers_api.engine.base import SamplingParams, SequenceRequest, TokenOutput, TokenStream

GREEDY = {"temperature": 0.0, "ignore_eos": True}


def ask(prompt: Sequence[int], **params: Any) -> SequenceRequest:
    return SequenceRequest(prompt, SamplingParams(**params))


def read(stream: TokenStream) -> dict[int, list[TokenOutput]]:
    """All outputs by sequence."""
    outputs = defaultdict(list)
    for output in stream.read(quiet_s=30):
        assert output is not None, "nothing came for 30 s"
        outputs[output.index].append(output)
    return outputs


def tokens(stream: TokenStream) -> list[list[int]]:
    """The generated ids of each sequence, in the order of the submit."""
    outputs = read(stream)
    for last in (each[-1] for each in outputs.values()):
        assert last.error is None, last.error
    return [
        [output.token_id for output in outputs[index] if output.token_id is not None]
        for index in sorted(outputs)
    ]


def complete(engine: Any, *requests: SequenceRequest) -> list[list[int]]:
    return tokens(engine.submit(list(requests)))
