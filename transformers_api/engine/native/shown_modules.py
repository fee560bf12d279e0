"""The modules of a model that a recorded pass stops at, for who looks and for who changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from transformers_api.engine.places import LayerPlaces
from transformers_api.engine.watched_pass import first_of, is_number
from transformers_api.kernels.capture import Recorder, current
from transformers_api.kernels.modules.experts import routing_modules

IN, OUT = "in", "out"  # sides of a module


@contextmanager
def shown_layers(model: Any) -> Iterator[None]:
    """While it lasts, recorders note what goes into the model's layers and what comes out."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    with ExitStack() as stack:
        for stacked in model.modules():
            for layer in stacked if isinstance(stacked, nn.ModuleList) else ():
                if len(stacked) == count:
                    handle = layer.register_forward_hook(_note_layer, with_kwargs=True)
                    stack.callback(handle.remove)
        for router in routing_modules(model):
            handle = router.register_forward_hook(_note_router)
            stack.callback(handle.remove)
        yield


@contextmanager
def shown_sides(model: Any) -> Iterator[None]:
    """While it lasts, recorders note what goes into each module and what comes out.

    ``leave_places`` is to be called after that.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if module is not model:
                handle = module.register_forward_pre_hook(_note_input, with_kwargs=True)
                stack.callback(handle.remove)
                stack.callback(module.register_forward_hook(_note_output).remove)
        yield


def leave_places(model: Any, places: tuple[LayerPlaces, ...], recorder: Recorder) -> None:
    """Forget the sides of modules but those in which numbers may be changed."""
    inputs = [each.layer for each in places[:1]]
    inputs += [name for each in places for name in (each.reader, each.down) if name]
    outputs = [writer.name for each in places for writer in (each.attn, each.mlp) if writer]
    sides = {(model.get_submodule(name), IN) for name in inputs}
    sides |= {(model.get_submodule(name), OUT) for name in outputs}
    recorder.module_calls = [
        call
        for call in recorder.module_calls
        if (side := call.options.get("side")) not in (IN, OUT) or (call.module, side) in sides
    ]


def _note_input(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    _note_side(module, first_of([x for x in (*args, *kwargs.values()) if is_number(x)]), IN)


def _note_output(module: nn.Module, args: Any, output: Any) -> None:
    _note_side(module, first_of(output), OUT)


def _note_side(module: nn.Module, tensor: Tensor | None, side: str) -> None:
    recorder = current()
    is_plain = type(tensor) is Tensor  # one without numbers has no memory
    if recorder is not None and tensor is not None and is_plain and recorder.is_written(tensor):
        recorder.add_module_call(module, [tensor], options={"side": side})


def _note_router(module: nn.Module, args: Any, output: Any) -> None:
    """Note a router's logits, the weights of the experts it chose, and which these are."""
    if not (isinstance(output, tuple) and all(isinstance(each, Tensor) for each in output)):
        return
    tensors = [args[0], *output]
    if (recorder := current()) and len({t.untyped_storage().data_ptr() for t in tensors}) == 4:
        recorder.add_module_call(module, tensors, options={"is_tuple": True})


def _note_layer(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    stream = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    made = output[0] if isinstance(output, tuple) else output
    if (recorder := current()) and stream is not None and isinstance(made, Tensor):
        recorder.add_module_call(
            module, [stream, made], options={"is_tuple": isinstance(output, tuple)}
        )
