"""Every causal language model of the installed transformers, against its own ``generate()``.

    python -m benchmarks.architectures
    python -m benchmarks.architectures phi3 "phi3, longrope" moshi
    python -m benchmarks.architectures --write docs/models.md
    python -m benchmarks.architectures --speed --write docs/models.md

A tiny model of random weights of each: greedy tokens and their log probabilities, alone, with three
others, in a second turn on a cached prefix, and those of the prompt's own tokens. A model that is
wrong, or that a worker does not end with in time, makes the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, today
from benchmarks.pages import table, write_block

LENGTHS = (20, 3, 9, 40)  # tokens of the prompts; the window of the models is 16
NEW_TOKENS = 10
TOLERANCE = 1e-2  # of a log probability: chunks of a scan round otherwise
MODEL_TIMEOUT_S = 120
UNLIKE = "as its own passes without a cache, which generate() differs from"
RANDOM = "generate() says something else each time"
PATHS = ("native kernels", "in a batch, by torch", "one at a time", "not served")


@dataclass
class Outcome:
    """What became of a model. ``faults``: empty where all is as ``generate()`` has it."""

    name: str
    path: str
    reason: str = ""  # why it is not served, or not faster
    faults: tuple[str, ...] = ()


# -- one model, in a worker ---------------------------------------------------------------------


def examine(name: str, folder: Path, native: Path | None) -> Outcome:
    """Load a model of random weights and compare it."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from benchmarks.tiny_models import NOT_ALONE, random_weights, tiny_config

    torch.set_num_threads(1)
    if name in NOT_ALONE:
        return Outcome(name, PATHS[3], NOT_ALONE[name])
    try:
        torch.manual_seed(0)
        model: Any = random_weights(AutoModelForCausalLM.from_config(tiny_config(name)))
        model.save_pretrained(folder)
        reference = type(model).from_pretrained(folder, dtype=torch.float32).eval()
        reference.generation_config = GenerationConfig()  # such as forced tokens
    except Exception as error:
        return Outcome(name, PATHS[3], f"transformers does not make one: {_line(error)}")
    return _compare(name, folder, reference, native)


def _compare(name: str, folder: Path, reference: Any, native: Path | None) -> Outcome:
    from transformers_api.engine.load_options import LoadOptions
    from transformers_api.engine.loader import load_engine
    from transformers_api.engine.thread import EngineThread
    from transformers_api.errors import ApiError

    thread = EngineThread(num_threads=1)
    reasons = _Reasons()
    logging.getLogger("transformers_api").addHandler(reasons)
    try:
        options = LoadOptions(num_slots=4, prefill_chunk=8, native=native)
        engine = thread.call(lambda: load_engine(folder, options, thread)).result()
    except ApiError as error:
        return Outcome(name, PATHS[3], f"{error}{_own_failure(reference)}")
    try:
        facts = engine.describe()
        path = PATHS[0] if facts.kernels == "native" else PATHS[1 + (facts.mode != "batching")]
        faults, remark = _faults(engine, reference)
        return Outcome(name, path, remark or reasons.last, tuple(faults))
    finally:
        engine.close()
        thread.stop()
        logging.getLogger("transformers_api").removeHandler(reasons)


def _own_failure(model: Any) -> str:
    try:
        _generated(model, _prompts()[0])
    except Exception as error:
        return f"; generate() fails too: {_line(error)}"
    return ""


class _Reasons(logging.Handler):
    """Why a model runs without the native kernels, as the loader says it."""

    last = ""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if " runs without " in text:
            self.last = text.partition(": ")[2]


def _faults(engine: Any, model: Any) -> tuple[list[str], str]:
    """What is wrong, and a remark."""
    prompts = _prompts()
    try:
        expected = [_generated(model, prompt) for prompt in prompts]
        if _generated(model, prompts[0])[0] != expected[0][0]:
            return [], RANDOM
    except Exception as error:
        return [f"generate() fails: {_line(error)}"], ""
    second = [*prompts[0], *expected[0][0], *prompts[1]]
    alone = _answers(engine, prompts[:1])[0]
    company = _answers(engine, [prompts[i] for i in (1, 2, 0, 3)])
    turns = _answers(engine, [second])
    again = _answers(engine, prompts[:1])
    made = [
        ("alone", alone, prompts[0]),
        *(("in company", company[place], prompts[i]) for place, i in enumerate((1, 2, 0, 3))),
        ("second turn", turns[0], second),
        ("alone again", again[0], prompts[0]),
    ]
    faults = _differences(made, model, _generated)
    remark = ""
    if faults and not _differences(made, model, _by_definition):
        faults, remark = [], UNLIKE
    return [*faults, *_prompt_differences(engine, model, prompts[0])], remark


Answer = tuple[list[int], list[float]]


def _answers(engine: Any, prompts: list[list[int]], **more: Any) -> list[Answer]:
    """Greedy tokens and their log probabilities, of prompts that run together."""
    from transformers_api.engine.base import SamplingParams, SequenceRequest

    params = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0, **more
    )
    stream = engine.submit([SequenceRequest(prompt, params) for prompt in prompts])
    answers: list[Answer] = [([], []) for _ in prompts]
    for output in stream.read(quiet_s=MODEL_TIMEOUT_S):
        if output is None or output.error is not None:
            raise RuntimeError(f"no answer: {output and output.error}")
        if output.token_id is not None:
            answers[output.index][0].append(output.token_id)
            answers[output.index][1].append(output.score.logprob)
    return answers


def _generated(model: Any, prompt: list[int]) -> Answer:
    import torch

    with torch.inference_mode():
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    ids = made.sequences[0, len(prompt) :].tolist()
    logprobs = [row[0].float().log_softmax(-1) for row in made.logits]
    return ids, [float(row[token]) for row, token in zip(logprobs, ids, strict=True)]


def _by_definition(model: Any, prompt: list[int]) -> Answer:
    """By passes over the whole sequence, one for each token."""
    import torch

    ids, logprobs = list(prompt), []
    for _ in range(NEW_TOKENS):
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([ids]), use_cache=False, return_dict=True)
        row = output.logits[0, -1].float().log_softmax(-1)
        ids.append(int(row.argmax()))
        logprobs.append(float(row.max()))
    return ids[len(prompt) :], logprobs


def _differences(
    made: list[tuple[str, Answer, list[int]]],
    model: Any,
    reference: Callable[[Any, list[int]], Answer],
) -> list[str]:
    differences = []
    for title, (ids, logprobs), prompt in made:
        their_ids, theirs = reference(model, prompt)
        gap = max(abs(a - b) for a, b in zip(logprobs, theirs, strict=True))
        if ids != their_ids:
            differences.append(f"{title}: other tokens")
        elif gap > TOLERANCE:
            differences.append(f"{title}: log probabilities {gap:.1g} apart")
    return list(dict.fromkeys(differences))


def _prompt_differences(engine: Any, model: Any, prompt: list[int]) -> Iterator[str]:
    import torch

    from transformers_api.engine.base import SamplingParams, SequenceRequest

    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    (output,) = engine.submit([SequenceRequest(prompt, params)]).read(quiet_s=MODEL_TIMEOUT_S)
    if output is None or output.error is not None:
        yield f"prompt's scores: {output and output.error}"
        return
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt]), return_dict=True).logits[0].float()
    own = logits.log_softmax(-1)
    gaps = [
        abs(s.logprob - float(own[i, s.token_id])) for i, s in enumerate(output.prompt_scores[1:])
    ]
    if max(gaps) > TOLERANCE:
        yield f"prompt's scores: {max(gaps):.1g} apart"


def _prompts() -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    return [torch.randint(10, 100, (n,), generator=generator).tolist() for n in LENGTHS]


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def work(names: list[str]) -> None:
    """The worker: one JSON line for each model, on the standard output and nothing else there."""
    import transformers

    from transformers_api.config.settings import Settings

    transformers.logging.set_verbosity_error()
    lines, native = os.fdopen(os.dup(1), "w"), Settings.from_env().native_cache
    logging.getLogger("transformers_api").setLevel(logging.INFO)
    for name in names:
        with ExitStack() as stack:
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nothing))
            stack.enter_context(redirect_stderr(nothing))
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            try:
                outcome = examine(name, Path(folder), native)
            except Exception as error:
                outcome = Outcome(name, "", faults=(f"{type(error).__name__}: {_line(error)}",))
        print(json.dumps(asdict(outcome)), file=lines, flush=True)


# -- all of them --------------------------------------------------------------------------------


def sweep(names: list[str], timeout_s: float = MODEL_TIMEOUT_S) -> Iterator[Outcome]:
    """The outcome of each, from workers that are replaced when they end or hang."""
    left = list(names)
    while left:
        for outcome in _worker(left, timeout_s):
            left.remove(outcome.name)
            yield outcome


def _worker(names: list[str], timeout_s: float) -> Iterator[Outcome]:
    """The outcomes of one worker; the last one is its end, where it does not get through."""
    command = [sys.executable, "-m", "benchmarks.architectures", "--worker", *names]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                lines.put(line)
        lines.put("")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        for name in names:
            try:
                line = lines.get(timeout=timeout_s)
            except queue.Empty:
                yield Outcome(name, "", faults=(f"nothing within {timeout_s:g} s",))
                return
            if not line:
                yield Outcome(name, "", faults=("the worker ended",))
                return
            made = json.loads(line)
            yield Outcome(**{**made, "faults": tuple(made["faults"])})
    finally:
        process.kill()
        process.wait()
        reader.join()


def main() -> int:
    """Compare and print tables."""
    from benchmarks.tiny_models import MODEL_TYPES, VARIANTS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="model types; default: all")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--speed", action="store_true", help="tokens/s at a 100M shape instead")
    parser.add_argument("--write", type=Path, help="a page to write into")
    options = parser.parse_args()
    if options.worker:
        work(options.names)
        return 0
    if options.speed:
        return _speed(options.names, options.write)
    began, outcomes = time.monotonic(), []
    for outcome in sweep(options.names or [*MODEL_TYPES, *VARIANTS]):
        outcomes.append(outcome)
        notes = "; ".join(outcome.faults) or outcome.reason
        print(f"{outcome.name:32} {outcome.path:22} {notes}", file=sys.stderr, flush=True)
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    text = summary(outcomes)
    print(text)
    if options.write:
        write_block(options.write, "architectures", text)
    return int(any(outcome.faults for outcome in outcomes))


def _speed(names: list[str], page: Path | None) -> int:
    from benchmarks.architecture_speed import NAMES, rows, speed_table
    from transformers_api.config.settings import Settings

    text = speed_table(list(rows(names or list(NAMES), Settings.from_env().native_cache)))
    print(text)
    if page:
        write_block(page, "speed", text)
    return 0


def summary(outcomes: list[Outcome]) -> str:
    """The tables of the page: how many take which path, what is not served, what is unlike."""
    counts = Counter(outcome.path for outcome in outcomes)
    rows = [[path, str(counts[path]), _names(outcomes, path)] for path in PATHS[:3]]
    unserved = [o for o in outcomes if o.path == PATHS[3]]
    text = table(["path", "models", "model types"], rows)
    reasons: dict[str, list[str]] = {}
    for outcome in unserved:
        reasons.setdefault(_reason(outcome), []).append(f"`{outcome.name}`")
    text += f"\n\nNot served, {len(unserved)}:\n\n"
    text += "\n".join(f"- {', '.join(names)}: {reason}." for reason, names in reasons.items())
    unlike = [o for o in outcomes if o.reason.endswith((UNLIKE, RANDOM)) and o.path != PATHS[3]]
    text += "\n\nWhere `generate()` is no measure:\n\n"
    text += "\n".join(f"- `{o.name}`: {o.reason}." for o in unlike)
    wrong = [o for o in outcomes if o.faults]
    text += f"\n\nWrong: {', '.join(f'`{o.name}`' for o in wrong) or 'none'}."
    return f"{text} {today()}; {machine()}."


def _names(outcomes: list[Outcome], path: str) -> str:
    return ", ".join(f"`{outcome.name}`" for outcome in outcomes if outcome.path == path)


def _reason(outcome: Outcome) -> str:
    """Why it is not served, without the name of its class."""
    reason = outcome.reason.split("; generate()")[0].rstrip(".")
    _, looks, ahead = reason.partition(": what it says of a token ")
    if looks:
        return f"what they say of a token {ahead}"
    return reason


if __name__ == "__main__":
    sys.exit(main())
