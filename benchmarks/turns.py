"""The second turn of a long chat: what a kept prefix saves of the time to the first token.

    python -m benchmarks.turns
    python -m benchmarks.turns --write docs/performance.md

One request at a time over HTTP, in turns: a long first message, a second turn after its answer, and
a message of a few words that nothing is known of. Medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import urllib.request
from pathlib import Path

from benchmarks import servers
from benchmarks.load import Answer, Message, Server, ask, conversation
from benchmarks.machine import machine, model_folder, today
from benchmarks.pages import table, write_block

WORDS = 378
TURNS = ("a few words, nothing known", "a long first message", "the second turn after it")


def answered(server: Server, messages: list[Message], max_tokens: int) -> Message:
    """The whole answer, as a message to go on from."""
    body = {"model": server.model, "messages": messages, "max_tokens": max_tokens}
    request = urllib.request.Request(
        f"{server.base_url}/chat/completions",
        json.dumps({**body, "temperature": 0, "ignore_eos": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as response:
        text = json.load(response)["choices"][0]["message"]["content"]
    return {"role": "assistant", "content": text}


def one_round(server: Server, chance: random.Random, max_tokens: int) -> list[Answer]:
    """Each of TURNS once."""
    few, long = conversation(0, chance), conversation(WORDS, chance)
    asked = [asyncio.run(ask(server, messages, 2)) for messages in (few, long)]
    more = [*long, answered(server, long, max_tokens), {"role": "user", "content": "And then?"}]
    return [*asked, asyncio.run(ask(server, more, 2))]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--max-tokens", type=int, default=64, help="length of the first answer")
    parser.add_argument("--scratch", type=Path, default=Path("build/bench"))
    parser.add_argument("--write", type=Path, help="a page to write into")
    options = parser.parse_args()
    servers.end_on_signals()
    scratch, chance = options.scratch.absolute(), random.Random(0)
    contender = servers.ours(model_folder(options.model, scratch), scratch)
    with tempfile.TemporaryFile() as log, servers.running(contender, log) as running:
        one_round(running.server, chance, options.max_tokens)  # nobody's first time counts
        rounds = []
        for number in range(options.rounds):
            rounds.append(one_round(running.server, chance, options.max_tokens))
            firsts = [f"{1e3 * each.first:.0f} ms" for each in rounds[-1]]
            print(number + 1, *firsts, file=sys.stderr)
    middles = [1e3 * statistics.median(a.first for a in turn) for turn in zip(*rounds, strict=True)]
    rows = [
        [name, f"{answer.prompt_tokens}", f"{middle:.0f}", f"{middle / middles[0]:.2f}x"]
        for name, answer, middle in zip(TURNS, rounds[-1], middles, strict=True)
    ]
    text = table(["prompt", "tokens", "first token, ms", "of a few words'"], rows)
    text += f"\n\nAsked for: 1.5x in the second turn. {today()}, {options.model}, medians of "
    text += f"{options.rounds} rounds. {machine()}."
    print(text)
    if options.write:
        write_block(options.write, "turns", text)


if __name__ == "__main__":
    main()
