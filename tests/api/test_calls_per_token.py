"""The way of a token up to the client: short, and held so by counting calls."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import transformers_api
from tests.fakes import FakeEngine, say

PACKAGE = str(Path(transformers_api.__file__).parent)
FEW, MANY = 40, 140  # tokens
ON_THE_WAY = (
    "TokenStream.get",
    "BytesDetokenizer.push",
    "ChoiceText.take",
    "Generation.__next__",
    "ChatFormatter.frames",
    "RequestContext._frames",
)


def calls(served, tokens):
    """The functions of ours that the thread of a request enters for a stream of so many tokens."""
    entered: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            entered.append(frame.f_code.co_qualname)

    response = served.chat(stream=True, ignore_eos=True, max_tokens=tokens)
    sys.setprofile(note)
    try:
        body = response.get_data()
    finally:
        sys.setprofile(None)
    response.close()
    assert body.count(b"data: ") == tokens + 3  # the role, the end and [DONE]
    return entered


def test_a_token_of_a_streamed_chat_passes_through_six_functions(serve):
    served = serve(FakeEngine(say("a")), keepalive_s=10)
    calls(served, FEW)  # what is looked up once
    few, many = calls(served, FEW), calls(served, MANY)
    for name in ON_THE_WAY:
        assert many.count(name) - few.count(name) == MANY - FEW, name
    assert len(many) - len(few) == len(ON_THE_WAY) * (MANY - FEW)
