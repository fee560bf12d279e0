"""The cases of a file by nnsight: `by_nnsight.py FOLDER CASES LOGITS`.

Run by the Python of `make libraries`, which has nnsight; it knows nothing of this project.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from nnsight import NNsight
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


def main(folder: str, cases_file: str, target: str) -> None:
    """Write the logits (V,) after the last token of each case's text; of attention there are none."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers, reader, down, mlp = MODULES[model.config.model_type]
    traced = NNsight(model)
    with open(cases_file) as file:
        content = json.load(file)
    ids = torch.tensor([content["ids"]])
    logits = {}
    for name, case in content["cases"].items():
        part = case["part"]
        if part == "weights":
            continue
        place = within(traced, f"{layers}.{case['layer']}")
        vector = None if case["vector"] is None else torch.tensor(case["vector"])
        width = content["head_dim"] if part == "head" else 1
        units = case["units"] and [u * width + i for u in case["units"] for i in range(width)]
        span, do, by = slice(case["first"], case["stop"]), case["do"], case["by"]
        if part in ("head", "neuron"):
            module = within(place, reader if part == "head" else down)
            if vector is not None:
                vector = vector.flatten().repeat(len(units) // vector.numel())
        else:
            module = within(place, mlp) if part == "mlp" else place
        source = None
        if case["from"] is not None:
            with torch.no_grad(), traced.trace(torch.tensor([case["from"]]), use_cache=False):
                source = (
                    module.output if torch.is_tensor(module.output) else module.output[0]
                ).save()
        with torch.no_grad(), traced.trace(ids, use_cache=False):
            is_input = part in ("head", "neuron")
            output = module.input if is_input else module.output
            x = (output if torch.is_tensor(output) else output[0]).clone()
            own = x[:, span] if units is None else x[:, span, units]
            if do == "add":
                own = own + vector
            elif do == "erase":
                own = own - (own @ vector)[..., None] * vector
            elif do == "scale":
                own = own * by
            elif source is not None:
                own = source[:, span]
            else:
                own = vector.expand_as(own)
            if units is None:
                x[:, span] = own
            else:
                x[:, span, units] = own
            if is_input:
                module.input = x
            elif torch.is_tensor(output):
                module.output = x
            else:
                module.output = (x, *output[1:])
            last = traced.lm_head.output[0, -1].save()
        logits[name] = last.tolist()
    with open(target, "w") as file:
        json.dump(logits, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
