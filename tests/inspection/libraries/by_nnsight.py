"""The cases of a file by nnsight: `by_nnsight.py FOLDER CASES LOGITS`.

Run by the Python of `make libraries`, which has nnsight; it knows nothing of this project.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from nnsight import NNsight
from torch import Tensor
from transformers import AutoModelForCausalLM

# Of each model type: the layers, then in a layer what reads the heads, what reads the neurons, and
# what the MLP adds to the stream.
MODULES = {
    "llama": ("model.layers", "self_attn.o_proj", "mlp.down_proj", "mlp"),
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj", "mlp"),
    "gemma2": ("model.layers", "self_attn.o_proj", "mlp.down_proj", "post_feedforward_layernorm"),
}


def within(root: Any, path: str) -> Any:
    """The module of that name."""
    for name in path.split("."):
        root = root[int(name)] if name.isdigit() else getattr(root, name)
    return root


def changed(case: dict[str, Any], before: Tensor, width: int, source: Tensor | None) -> Tensor:
    """The tensor (1, n, C) with the case's change; a unit has ``width`` columns."""
    x = before.clone()
    span = slice(case["first"], case["stop"])
    columns = list(range(x.shape[-1]))
    if case["units"]:
        columns = [unit * width + i for unit in case["units"] for i in range(width)]
    own = x[:, span, columns]
    vector = None if case["vector"] is None else torch.tensor(case["vector"]).flatten()
    if vector is not None and case["do"] != "erase":
        vector = vector.repeat(len(columns) // len(vector))
    if case["do"] == "add":
        own = own + vector
    elif case["do"] == "erase":
        own = own - (own @ vector)[..., None] * vector
    elif case["do"] == "scale":
        own = own * case["by"]
    else:
        own = vector.expand_as(own) if source is None else source[:, span]
    x[:, span, columns] = own
    return x


def answer(traced: Any, module: Any, ids: Tensor, case: dict[str, Any], head_dim: int) -> Tensor:
    """The logits (V,) after the last token."""
    source = None
    if case["from"] is not None:
        with torch.no_grad(), traced.trace(torch.tensor([case["from"]]), use_cache=False):
            output = module.output
            source = (output if torch.is_tensor(output) else output[0]).save()
    width = head_dim if case["part"] == "head" else 1
    is_input = case["part"] in ("head", "neuron")
    with torch.no_grad(), traced.trace(ids, use_cache=False):
        output = module.input if is_input else module.output
        x = changed(case, output if torch.is_tensor(output) else output[0], width, source)
        if is_input:
            module.input = x
        elif torch.is_tensor(output):
            module.output = x
        else:
            module.output = (x, *output[1:])
        logits = traced.lm_head.output[0, -1].save()
    return logits


def main(folder: str, cases_file: str, target: str) -> None:
    """Write the logits of each case, but for those of attention weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers, reader, down, mlp = MODULES[model.config.model_type]
    traced = NNsight(model)
    with open(cases_file) as file:
        content = json.load(file)
    logits = {}
    for name, case in content["cases"].items():
        if case["part"] == "weights":
            continue
        place = within(traced, f"{layers}.{case['layer']}")
        paths = {"head": reader, "neuron": down, "mlp": mlp}
        module = within(place, paths[case["part"]]) if case["part"] in paths else place
        ids = torch.tensor([content["ids"]])
        logits[name] = answer(traced, module, ids, case, content["head_dim"]).tolist()
    with open(target, "w") as file:
        json.dump(logits, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
