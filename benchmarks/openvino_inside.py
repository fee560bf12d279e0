"""OpenVINO GenAI's continuous batching on conversations from standard input; figures on its output.

Runs in OpenVINO's own environment and imports nothing of ours: `benchmarks/serve.py` starts it with
a GGUF file. Standard input has {"max_tokens": N, "levels": {name: [messages, ...]}}: what a level
has is asked at once. Standard output gets one JSON object, name to figures.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

genai: Any = importlib.import_module("openvino_genai")  # which is not among our requirements


def pipeline(file: Path) -> Any:
    """Batching over the folder that OpenVINO makes of a GGUF file, next to it and once."""
    folder = file.with_suffix(".openvino")
    if not (folder / "openvino_tokenizer.xml").is_file():
        folder.mkdir(exist_ok=True)
        link = folder / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file)
        genai.LLMPipeline(str(link), "CPU", enable_save_ov_model=True)
    return genai.ContinuousBatchingPipeline(str(folder), genai.SchedulerConfig(), "CPU", {})


def level(batching: Any, conversations: list[Any], max_tokens: int) -> dict[str, float]:
    """Add them all, step until they are answered; times as a client would see them."""
    config = genai.GenerationConfig()
    config.max_new_tokens = max_tokens
    config.ignore_eos = True
    config.do_sample = False
    tokenizer = batching.get_tokenizer()
    prompts = [tokenizer.apply_chat_template(messages, True) for messages in conversations]
    began = time.perf_counter()
    handles = {
        number: batching.add_request(number, prompt, config)
        for number, prompt in enumerate(prompts)
    }
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    counts = dict.fromkeys(handles, 0)
    while batching.has_non_finished_requests():
        batching.step()
        now = time.perf_counter() - began
        for number, handle in handles.items():
            if handle.can_read():
                for output in handle.read().values():
                    counts[number] += len(output.generated_ids)
                first.setdefault(number, now)
                last[number] = now
    per_token = [(last[n] - first[n]) / max(1, counts[n] - 1) for n in handles]
    return {
        "ttft_ms": 1e3 * statistics.median(first.values()),
        "itl_ms": 1e3 * statistics.median(per_token),
        "prompt_tokens": float(tokenizer.encode(prompts[0]).input_ids.shape[1]),
        "tokens_per_s": sum(counts.values()) / (time.perf_counter() - began),
    }


def main() -> None:
    """Answer one job."""
    began = time.perf_counter()
    job = json.load(sys.stdin)
    batching = pipeline(Path(sys.argv[1]))
    hello = [[{"role": "user", "content": "Say hello."}]]
    level(batching, hello, 1)
    figures: dict[str, dict[str, float]] = {"start": {"s": time.perf_counter() - began}}
    level(batching, hello, job["max_tokens"])
    for name, conversations in job["levels"].items():
        figures[name] = level(batching, conversations, job["max_tokens"])
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
