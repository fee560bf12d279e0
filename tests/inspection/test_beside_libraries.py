"""Edits beside the same ones by TransformerLens and by nnsight, which are made for nothing else.

They come with `make libraries`, into an environment of their own.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tests.engine.models import prompts_of
from tests.inspection.models import tiny
from tests.inspection.test_edits import DIRECTION, LAYER, PROMPT, VECTOR, edit, plan, written

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "build/peers/inside/bin/python"
SCRIPTS = Path(__file__).with_name("libraries")
OTHER = [*prompts_of(4)[3][: len(PROMPT) - 1], PROMPT[-1]]
HEAD_DIM, FIRST, COUNT = 8, 2, 5
SPAN = ((FIRST, FIRST + COUNT),)
CASES = {
    "add": edit(vector=VECTOR),
    "add to some": edit(vector=VECTOR, positions=SPAN),
    "erase": edit(do="erase", vector=DIRECTION),
    "zero heads": edit(do="scale", part="head", units=(1, 3), by=0.0),
    "mean of a head": edit(do="set", part="head", units=(2,), vector=VECTOR[:HEAD_DIM]),
    "half an MLP": edit(do="scale", part="mlp", by=0.5),
    "neurons": edit(do="set", part="neuron", units=(5, 7), vector=numpy.float32([3, -4])),
    "patch": edit(do="set", positions=SPAN, is_aligned=True),
    "block": edit(do="block", part="weights", units=(0, 2), keys=((1, 4),)),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not PYTHON.exists(), reason="needs `make libraries`"),
]


def saved(name: str, folder: Path) -> Path:
    """The model with a tokenizer that the libraries can load."""
    model = tiny(name)
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "w0", "pad_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def in_words(case):
    """The case as the libraries' scripts read it."""
    first, stop = case.positions[0]
    vector = None if case.vector is None else case.vector.tolist()
    if case.do == "erase":
        (vector,) = vector
    return {
        "do": case.do,
        "part": case.part,
        "layer": case.layer,
        "units": list(case.units) or None,
        "vector": None if case.is_aligned else vector,
        "by": case.by,
        "first": first,
        "stop": stop,
        "keys": list(range(*case.keys[0])) if case.keys else None,
        "from": OTHER if case.is_aligned else None,
    }


def theirs(library: str, folder: Path) -> dict[str, torch.Tensor]:
    """Log probabilities of each case by a library."""
    cases, target = folder / "cases.json", folder / f"{library}.json"
    content = {
        "ids": PROMPT,
        "head_dim": HEAD_DIM,
        "cases": {name: in_words(case) for name, case in CASES.items()},
    }
    cases.write_text(json.dumps(content))
    command = [PYTHON, SCRIPTS / f"by_{library}.py", folder, cases, target]
    subprocess.run(command, check=True, timeout=250, cwd=folder, capture_output=True)
    logits = json.loads(target.read_text())
    return {name: torch.tensor(own).log_softmax(-1) for name, own in logits.items()}


def ours(watched, name, case):
    """The likeliest tokens and their log probabilities after the prompt, by what is served."""
    if case.is_aligned:
        (numbers,) = watched.run(watched.inspector.part_numbers(OTHER, [(LAYER, "resid")]))
        case = edit(
            do="set",
            positions=SPAN,
            is_aligned=True,
            vector=numpy.ascontiguousarray(numbers[FIRST : FIRST + COUNT]),
        )
    edits = plan(case, identity=f"beside {name}")
    (steps,) = written(watched.engine, [(PROMPT, edits)], max_tokens=1, logprobs=20)
    return dict(steps[0][1].top)


@pytest.mark.parametrize("library", ["transformer_lens", "nnsight"])
@pytest.mark.parametrize("model", ["llama", "gpt2", "gemma2"])
def test_edits_give_what_the_library_gives(watch, tmp_path, library, model):
    expected = theirs(library, saved(model, tmp_path))
    assert len(expected) >= len(CASES) - 1
    watched = watch(model)
    unedited = dict(
        written(watched.engine, [(PROMPT, None)], max_tokens=1, logprobs=20)[0][0][1].top
    )
    for name, logprobs in expected.items():
        own = ours(watched, name, CASES[name])
        for token, value in own.items():
            assert value == pytest.approx(float(logprobs[token]), abs=1e-4), (name, token)
        assert max(abs(own.get(token, 0) - value) for token, value in unedited.items()) > 1e-3, name
