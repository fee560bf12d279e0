"""The cases of a file by TransformerLens: `by_transformer_lens.py FOLDER CASES LOGITS`.

Run by the Python of `make libraries`, which has TransformerLens; it knows nothing of this project.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

HOOKS = {
    "resid": "blocks.{}.hook_out",
    "mlp": "blocks.{}.hook_mlp_out",
    "head": "blocks.{}.attn.hook_z",
    "neuron": "blocks.{}.mlp.hook_post",
    "weights": "blocks.{}.attn.hook_pattern",
}


def changed(case: dict[str, Any], before: Tensor, source: Tensor | None) -> Tensor:
    """What a hook returns for the tensor (1, n, …) that it is given."""
    x = before.clone()
    if case["part"] == "weights":  # (1, H, queries, keys)
        for head in case["units"]:
            x[:, head, :, case["keys"]] = 0
        return x / x.sum(-1, keepdim=True)
    span = slice(case["first"], case["stop"])
    units = case["units"]
    own = x[:, span] if units is None else x[:, span, units]
    vector = torch.tensor(case["vector"]) if case["vector"] is not None else None
    if case["do"] == "add":
        own = own + vector
    elif case["do"] == "erase":
        own = own - (own @ vector)[..., None] * vector
    elif case["do"] == "scale":
        own = own * case["by"]
    elif source is not None:
        own = source[:, span]
    else:
        own = vector.expand_as(own)
    if units is None:
        x[:, span] = own
    else:
        x[:, span, units] = own
    return x


def main(folder: str, cases_file: str, target: str) -> None:
    """Write the logits (V,) after the last token of each case's text."""
    bridge = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)
    with open(cases_file) as file:
        content = json.load(file)
    ids = torch.tensor([content["ids"]])
    logits = {}
    with torch.no_grad():
        for name, case in content["cases"].items():
            hook = HOOKS[case["part"]].format(case["layer"])
            source = None
            if case["from"] is not None:
                _, cache = bridge.run_with_cache(torch.tensor([case["from"]]))
                source = cache[hook]
            logits[name] = bridge.run_with_hooks(
                ids,
                fwd_hooks=[
                    (hook, lambda x, hook, case=case, source=source: changed(case, x, source))
                ],
            )[0, -1].tolist()
    with open(target, "w") as file:
        json.dump(logits, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
