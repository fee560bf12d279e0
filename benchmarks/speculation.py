"""What reading ahead (PROMPT_LOOKUP_TOKENS) gains: one answer at a time, with and without it.

    python -m benchmarks.speculation --folder FOLDER

Tokens per second from the first token on, medians of the rounds, which take turns; the answers are
compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.machine import default_model_folder, processor
from transformers_api.config.settings import Settings
from transformers_api.engine.base import SamplingParams, SequenceRequest
from transformers_api.engine.llm_engine import BatchingEngine
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import load_engine
from transformers_api.engine.prompt_lookup import PromptLookup
from transformers_api.engine.thread import EngineThread

TEXT = (
    "The ferry leaves the northern harbour at seven, calls at both islands, and is back before "
    "noon. In winter it sails on Mondays and Thursdays only, and never when the wind is above "
    "eight. Tickets are sold on board; children under six travel free, bicycles cost two crowns."
)
CODE = (
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\n"
    "    def add(self, other):\n        return Point(self.x + other.x, self.y + other.y)\n"
)
TASKS = {
    "story": "Write a story about a lighthouse keeper who finds a map.",
    "copy": f"Repeat the following text word for word.\n\n{TEXT}",
    "summary": f"Summarise the following text in three sentences.\n\n{TEXT}",
    "code": f"Add the methods subtract, multiply and divide to this class.\n\n{CODE}",
}
TOKENS = 96


def answer(
    engine: BatchingEngine, prompt: list[int], temperature: float
) -> tuple[float, list[int]]:
    """(tokens per second after the first, the tokens)."""
    params = SamplingParams(max_tokens=TOKENS, temperature=temperature, seed=1, ignore_eos=True)
    stream = engine.submit([SequenceRequest(prompt, params)])
    ids, began = [], 0.0
    for output in stream.read():
        began = began or time.perf_counter()
        if output is not None and output.token_id is not None:
            ids.append(output.token_id)
    return (len(ids) - 1) / (time.perf_counter() - began), ids


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="a model in the transformers format")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ahead", default="4,8")
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args()
    folder = options.folder or default_model_folder()
    thread = EngineThread()
    load = LoadOptions(native=Settings.from_env({}).native_cache)
    engine = thread.call(lambda: load_engine(folder, load, thread)).result()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    most = [0, *(int(part) for part in options.ahead.split(","))]
    print(f"| tokens per second | off | {' | '.join(f'up to {n}' for n in most[1:])} |")
    print(f"| --- {'| ---: ' * len(most)}|")
    for name, task in TASKS.items():
        chat = [{"role": "user", "content": task}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        speeds: dict[int, list[float]] = {n: [] for n in most}
        steps: dict[int, int] = {}
        answers = []
        for _ in range(options.rounds):
            for n in most:
                engine.lookup, before = PromptLookup(n), engine.stats().steps
                speed, ids = answer(engine, prompt, options.temperature)
                speeds[n].append(speed)
                steps[n] = engine.stats().steps - before
                answers.append(ids)
        assert all(ids == answers[0] for ids in answers), "reading ahead changed an answer"
        cells = [f"{statistics.median(speeds[n]):.0f} ({steps[n]} steps)" for n in most]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(f"\n{folder.name}, {TOKENS} tokens, medians of {options.rounds} rounds. {processor()}.")
    thread.call(engine.close)
    thread.stop()


if __name__ == "__main__":
    main()
