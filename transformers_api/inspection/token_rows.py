"""The rows of one token, as they passed through a model's modules; on the engine thread."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from transformers_api.engine.watched_pass import first_of, stream_of

TRACE = "trace"  # in ``observe`` and ``extras`` of a sequence
MOVED = "moved"  # in ``extras``: what edits added to its rows
Moved = dict[tuple[str, str], Tensor]  # (C,) by module and side


@dataclass(slots=True)
class TokenRows:
    """Rows of one token, as they passed through modules; ``moved``: what edits added to them."""

    inputs: dict[str, Tensor] = field(default_factory=dict)  # (C,) by module
    outputs: dict[str, Tensor] = field(default_factory=dict)
    moved: Moved = field(default_factory=dict)

    @contextmanager
    def watched(self, model: Any, names: Sequence[str]) -> Generator[None, None, None]:
        """Note the last token's rows of these modules, while it lasts."""

        def hook(name: str) -> Any:
            def note(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                stream = stream_of(args, kwargs)
                own = first_of(args) if stream is None else stream
                made = first_of(output)
                if own is not None:
                    self.inputs[name] = own.reshape(-1, own.shape[-1])[-1].clone()
                if made is not None:
                    self.outputs[name] = made.reshape(-1, made.shape[-1])[-1].clone()

            return note

        with ExitStack() as stack:
            for name in dict.fromkeys(names):
                module = model.get_submodule(name)
                handle = module.register_forward_hook(hook(name), with_kwargs=True)
                stack.callback(handle.remove)
            yield
