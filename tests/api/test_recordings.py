"""The recorded answers of the originals: ours have the same statuses, headers, framing, shapes.

Texts, ids and times are not compared. Where we answer otherwise on purpose, DIFFERENT says what
and why; an entry that no longer differs fails too.
"""

from __future__ import annotations

import pytest

from tests.api.recordings import complaints, recording
from transformers_api.serving.models.builtin import builtin_models

NOT_FOUND = "the document says 404 for an unknown model"
BAD_FIELD = "the document says 400 for invalid parameters"
NOT_SSE = "the original sent bare text under the name of server-sent events"
GREEDY = "temperature 0 is greedy here, as in every other route"
LONGER = "up to the model's context, not up to 500"
TINYGPT = {
    5: (200, NOT_SSE),
    6: (404, NOT_FOUND),
    8: (404, NOT_FOUND),
    9: (400, BAD_FIELD),
    10: (200, LONGER),
    11: (200, GREEDY),
    12: (400, BAD_FIELD),
}
OPENAI = "errors under /v1 are OpenAI's error object, as its clients expect"

# By recording: place of the request, our status, why.
DIFFERENT = {
    "tinygpt_doc": TINYGPT,
    "tinygpt_head": TINYGPT | {7: (404, NOT_FOUND)},
    "flask_wrapper": {
        5: (200, "pages of other origins may read only what CORS_ALLOW_ORIGINS names"),
        8: (400, "native routes have {detail}, as TinyGPT's document says"),
        9: (404, "an id that cannot exist is not found; that is no failure of the server"),
        10: (400, OPENAI),
        11: (400, OPENAI),
        12: (404, OPENAI),
        13: (200, "temperature 0 was a 500: its failed load had wedged the process"),
        14: (404, "outside of /v1 errors are {detail}"),
        15: (405, "the original sent a page of HTML"),
    },
    "simple_llm_host": {
        1: (200, "no body names a folder of the server's machine: cache_dir is null"),
        3: (200, "a request for a model that is not in memory loads it (AUTO_LOAD)"),
        6: (404, "an id that cannot exist is not found; that is no failure of the server"),
        7: (400, OPENAI),
        10: (200, "the original ignored `stream`"),
        11: (400, OPENAI),
        12: (400, OPENAI),
        14: (404, OPENAI),
        15: (404, OPENAI),
    },
}
# The originals' state when the recording began.
START = {
    "tinygpt_doc": {"models": ("tinygpt", "tinygpt-moe"), "loaded": "tinygpt", "auto_load": False},
    "tinygpt_head": {"models": ("tinygpt2",), "loaded": "tinygpt2", "auto_load": False},
    "flask_wrapper": {"models": ("gpt2", "microsoft/DialoGPT-small"), "auto_load": True},
    "simple_llm_host": {"models": ("gpt2", "EleutherAI/gpt-neo-125m"), "auto_load": True},
}


@pytest.mark.parametrize("name", sorted(DIFFERENT))
def test_recorded_requests_are_answered_alike(name, serve):
    start = START[name]
    specs = tuple(spec for spec in builtin_models() if spec.name in start["models"])
    assert len(specs) == len(start["models"])
    served = serve(specs=specs, default_model=specs[0].name, auto_load=start["auto_load"])
    if "loaded" in start:
        served.swapper.load(start["loaded"])
    found = {}
    for place, recorded in enumerate(recording(name)):
        status, differs = complaints(recorded, served.client)
        if differs:
            found[place] = (status, str(recorded), differs)
    unexpected = {place: found[place] for place in found.keys() - DIFFERENT[name].keys()}
    assert unexpected == {}
    assert {place: status for place, (status, *_) in found.items()} == {
        place: status for place, (status, _) in DIFFERENT[name].items()
    }
