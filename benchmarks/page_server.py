"""The page's files, and an API that writes a made-up answer at a fixed pace, for benchmarks.page.

Real answers come as fast as the machine of the moment; here 200 tokens a second come whatever runs
beside it, each with ten candidates and a row of attention of nine heads, as the server writes them.
"""

from __future__ import annotations

import base64
import json
import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from transformers_api.api.web.assets import PREFIX, Asset, assets

MODEL = "paced"
LAYERS, HEADS, LAYER = 30, 9, 23
TEXT = " the story of a keeper who lit his lamp each night and wrote what the sea had said .\n"
WORDS = TEXT.split(" ")
CANDIDATES = 10

Json = dict[str, Any]


def anatomy() -> Json:
    """What the page hears about the model."""
    layer = {"type": "full_attention", "heads": HEADS, "available": True, "reason": None}
    attention = {"mode": "tap", "verified": True, "max_rel_err": 1e-7, "while_writing": True}
    shape = {"id": MODEL, "layers": LAYERS, "heads": HEADS, "context": 8192}
    attention["per_layer"] = [layer | {"layer": at} for at in range(LAYERS)]
    return shape | {"suggested_layer": LAYER, "attention": attention, "lens": {"available": False}}


def answers() -> dict[str, Any]:
    """What the page asks beside the answer."""
    resident = {"model": MODEL, "device": "cpu", "bytes": 1, "running": 0, "waiting": 0}
    status = {"ready": True, "state": "ready", "resident": resident, "loading": None}
    model = {"id": MODEL, "loaded": True, "owned_by": "nobody", "max_model_len": 8192}
    model |= {"local": True, "capabilities": ["chat", "completion", "trace"]}
    return {
        "/status": status | {"queued": {}, "failed": {}, "uptime_s": 1, "limits": {}},
        "/v1/models": {"object": "list", "data": [model]},
        "/models": [],
        "/inspect/model": anatomy(),
    }


def prompt_of(messages: list[Json]) -> Json:
    """Tokens of a prompt: a word each."""
    tokens, spans = ["<|im_start|>", "system", "\n", "<|im_end|>"], []
    for message in messages:
        start = len(tokens)
        tokens += [f" {word}" for word in str(message["content"]).split(" ")]
        span = {"role": message["role"], "start": start, "end": len(tokens)}
        spans.append(span | {"section": "content"})
        tokens += ["<|im_end|>", "\n"]
    return {"token_ids": list(range(len(tokens))), "tokens": tokens, "spans": spans}


def weights(keys: int, chance: random.Random) -> Json:
    """Rows as models have them: most on the first token, a few others heavy."""
    data = bytearray()
    for _ in range(HEADS):
        data += bytes([255, *(int(60 * chance.random() ** 12) for _ in range(keys - 1))])
    shape = {"dtype": "uint8", "shape": [HEADS, keys], "order": "C", "encoding": "base64"}
    return shape | {"scale": [0.6] * HEADS, "data": base64.b64encode(data).decode()}


def traced(step: int, position: int, chance: random.Random) -> tuple[str, Json]:
    """A token's text and its trace."""
    word = WORDS[step % len(WORDS)]
    text = f" {word}" if word else "The"
    surprisal = chance.expovariate(1)
    other = math.log((1 - math.exp(-surprisal)) / 20 + 1e-9)
    topk = [{"token_id": 10 * step, "token": text, "logprob": -surprisal}]
    for at in range(1, CANDIDATES):
        topk.append({"token_id": 10 * step + at, "token": f" other{at}", "logprob": other})
    row = {"layer": LAYER, "key_start": 0, "state": "exact", "sink": None}
    facts = {"index": 0, "step": step, "position": position, "token_id": 10 * step, "rank": 0}
    facts |= {"logprob": -surprisal, "surprisal": surprisal, "entropy": 1.2}
    return text, facts | {"topk": topk, "attn": [row | weights(position, chance)]}


def chunks(body: Json) -> Iterator[Json]:
    """The events of an answer of ``max_tokens`` tokens."""
    prompt = prompt_of(body["messages"])
    about = {"id": "chatcmpl-0", "object": "chat.completion.chunk", "model": MODEL}
    start = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    header = {"noted": True, "prompt": prompt, "verified": True}
    yield about | {"choices": [start], "trace": header}
    chance = random.Random(0)
    count = body.get("max_tokens") or 600
    for step in range(count):
        text, trace = traced(step, len(prompt["token_ids"]) + step, chance)
        end = "length" if step + 1 == count else None
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": end}
        yield about | {"choices": [choice], "trace": trace}


class Handler(BaseHTTPRequestHandler):
    """The page, and the API behind it."""

    protocol_version = "HTTP/1.1"
    pace_s = 1 / 200

    def log_message(self, *_: object) -> None:
        """Say nothing."""
        return

    def do_GET(self) -> None:
        """Give a file, or what the page asks about the server."""
        path = urlsplit(self.path).path
        found = answers().get(path)
        if found is not None:
            self.send("application/json", json.dumps(found).encode())
        elif path in (PREFIX, "/"):
            self.send_asset(assets().page)
        elif path.startswith(f"{PREFIX}/{assets().version}/"):
            self.send_asset(assets().files[path.split("/", 3)[3]])
        else:
            self.send_error(404)

    def send_asset(self, asset: Asset) -> None:
        """As the server sends them: compressed."""
        if asset.gzipped is None:
            self.send(asset.content_type, asset.raw)
        else:
            self.send(asset.content_type, asset.gzipped, {"Content-Encoding": "gzip"})

    def send(self, content_type: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Send an answer."""
        self.send_response(200)
        length = {"Content-Type": content_type, "Content-Length": str(len(body))}
        for name, value in (length | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        """Write an answer at the pace."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if urlsplit(self.path).path != "/v1/chat/completions":
            self.send_error(404)
            return
        events = [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks(body)]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        begin = time.monotonic()
        for step, event in enumerate(events):
            time.sleep(max(0.0, begin + step * self.pace_s - time.monotonic()))
            self.wfile.write(event)
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True


@contextmanager
def paced(tokens_per_s: float) -> Iterator[str]:
    """The address of such a server."""
    Handler.pace_s = 1 / tokens_per_s
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # a browser that leaves
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
