"""A server with a model that does what its prompt says.

For agents that must come to call a tool by themselves, with whatever is in their prompts. The last
turn of a user that has lines ``CALL name {json}`` and ``SAY text`` (or a string of JSON, for several
lines) is its script: a step for each turn of the assistant. As any model it is held by the constraint of its
request: it takes the allowed token that ends what is open soonest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from flask import Flask

from tests import tokenizers
from tests.fakes import EOS, FakeEngine, FakeLoader, Run, fake_model
from tests.serving.tools.templates import TEMPLATES
from transformers_api import app
from transformers_api.config.settings import Settings
from transformers_api.engine.base import FinishReason, SequenceRequest, TokenOutput

STEP = re.compile(r"(?:CALL (?P<name>[\w.-]+) (?P<arguments>\{.*\}))|(?:SAY (?P<text>.*))")
START = b"\x02"  # of a turn; no client writes it
TURN = re.compile(r"\x02(\w+)\n([^\x02]*)")
SOONEST = [EOS, *b'"}],:tfn0123456789', *range(ord("a"), ord("z") + 1), *range(258)]
END = "All done."


def answer(prompt: str) -> str:
    """What the script of the prompt has for its next turn."""
    turns = TURN.findall(prompt)[:-1]
    for place in range(len(turns) - 1, -1, -1):
        steps = list(STEP.finditer(turns[place][1]))
        if turns[place][0] == "user" and steps:
            done = sum(role == "assistant" for role, _text in turns[place + 1 :])
            return _said(steps[done]) if done < len(steps) else END
    return END


def _said(step: re.Match[str]) -> str:
    if step["text"] is not None:
        text = step["text"]
        return json.loads(text) if text.startswith('"') else text
    call = {"name": step["name"], "arguments": json.loads(step["arguments"])}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


class ScriptedRun(Run):
    """Of the text of its prompt, within the constraint of its request."""

    def tokens(self, index: int, request: SequenceRequest) -> Iterator[TokenOutput]:
        prompt = bytes_of(request.prompt_ids).decode()
        script = [*answer(prompt).encode(), EOS]
        constraint, params = request.constraint, request.params
        for place in range(params.max_tokens):
            token_id = script[place] if place < len(script) else EOS
            if constraint is not None:
                if not _allows(constraint.allowed(), token_id):
                    script, token_id = [], _soonest(constraint.allowed())
                constraint.take(token_id)
            reason = None
            if token_id == EOS or token_id in params.stop_token_ids:
                reason = FinishReason.STOP
            elif constraint is not None and constraint.is_complete:
                reason = FinishReason.COMPLETE
            elif place + 1 == params.max_tokens:
                reason = FinishReason.LENGTH
            yield TokenOutput(token_id=token_id, finish_reason=reason)
            if reason is not None:
                return


class ScriptedEngine(FakeEngine):
    run_type = ScriptedRun


def bytes_of(prompt_ids: Sequence[int]) -> bytes:
    """The text of a prompt, its turns marked."""
    marks = {tokenizers.IM_START: START, tokenizers.IM_END: b""}
    return b"".join(bytes([i]) if i < 256 else marks[i] for i in prompt_ids)


def _allows(mask: Sequence[int] | None, token_id: int) -> bool:
    return mask is None or bool(mask[token_id // 32] >> (token_id % 32) & 1)


def _soonest(mask: Sequence[int]) -> int:
    return next(token_id for token_id in SOONEST if _allows(mask, token_id))


def create_app(settings: Settings) -> Flask:
    tokenizer = tokenizers.byte_level(chat_template=TEMPLATES["tagged json"])

    def build(spec: Any) -> Any:
        return fake_model(spec, ScriptedEngine(max_model_len=1_000_000), tokenizer=tokenizer)

    return app.create_app(settings, FakeLoader(build))
