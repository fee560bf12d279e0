"""Ask a question, and save what the model looked at while it answered.

    .venv/bin/python examples/attention_heatmap.py "Where is Rome?" --layer 12 --head 3

Writes attention.png, a square for each pair of tokens (a row is what one token read, the lighter
the more), and attention.html, the same as a page that names them: open it in a browser. The server
is the one of OPENAI_BASE_URL (default http://127.0.0.1:5000/v1).
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy
import requests


def heat_map(weights: numpy.ndarray, cell: int) -> bytes:
    """A grey PNG of a matrix of weights from 0 to 1, each a square of ``cell`` pixels.

    The square root is drawn: otherwise all but the heaviest weights are black.
    """
    grey = numpy.rint(255 * numpy.sqrt(weights)).astype(numpy.uint8)
    grey = grey.repeat(cell, axis=0).repeat(cell, axis=1)
    height, width = grey.shape
    lines = b"".join(b"\0" + line.tobytes() for line in grey)  # 0: the line has no filter

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    size = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits of grey
    body = chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def main() -> None:
    """Ask, then look inside the answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("question", nargs="?", default="What is the capital of France?")
    parser.add_argument("--model", default=os.environ.get("MODEL", "smollm2-135m-instruct"))
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--head", default="mean", help='a number, "mean" or "max"')
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("attention"), help="without suffix")
    options = parser.parse_args()
    base_url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:5000/v1")
    try:
        look_inside(base_url, options)
    except requests.HTTPError as error:
        sys.exit(f"{error.response.status_code}: {error.response.text.strip()}")
    except requests.ConnectionError:
        sys.exit(f"Nothing answers at {base_url}; start the server with `make run`")


def look_inside(base_url: str, options: argparse.Namespace) -> None:
    """Print an answer and what its last token read from; save the picture and the page."""
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"

    def post(
        url: str, body: dict[str, object], accept: str = "application/json"
    ) -> requests.Response:
        response = session.post(url, json=body, headers={"Accept": accept}, timeout=60)
        response.raise_for_status()
        return response

    answer = post(
        f"{base_url}/chat/completions",
        {
            "model": options.model,
            "messages": [{"role": "user", "content": options.question}],
            "max_tokens": options.max_tokens,
            "temperature": 0,
        },
    ).json()
    print(answer["choices"][0]["message"]["content"])
    question = {
        "completion_id": answer["id"],  # these tokens, not those of the text read again
        "trace_layer": options.layer,
        "head": int(options.head) if options.head.isdigit() else options.head,
    }
    attention = f"{base_url.removesuffix('/v1')}/inspect/full_attn"
    matrix = post(attention, question).json()
    page = post(attention, question, accept="text/html")
    picture, sheet = (options.output.with_suffix(suffix) for suffix in (".png", ".html"))
    picture.write_bytes(heat_map(numpy.array(matrix["attn"]), cell=max(1200 // matrix["n"], 1)))
    sheet.write_bytes(page.content)
    print(f"layer {matrix['layer']}, head {matrix['head']}: {picture} and {sheet}")
    last = sorted(zip(matrix["attn"][-1], matrix["tokens_display"], strict=True), reverse=True)
    print("the last token read from", ", ".join(f"{t} {w:.0%}" for w, t in last[:5]))


if __name__ == "__main__":
    main()
