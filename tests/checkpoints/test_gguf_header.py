from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from transformers_api.checkpoints.headers.gguf_file import read_gguf_header
from transformers_api.errors import ModelLoadFailed

U32, STRING, ARRAY, U8 = 4, 8, 9, 0
HUGE = 1 << 40
Tensor = tuple[str, list[int], int, int]  # name, dimensions as stored, type, offset
WEIGHT: Tensor = ("blk.0.weight", [8, 2], 0, 0)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(key: str, kind: int, count: int, values: bytes = b"") -> bytes:
    return entry(key, ARRAY, struct.pack("<IQ", kind, count) + values)


ARCHITECTURE = entry("general.architecture", STRING, text("llama"))


def gguf(
    *entries: bytes,
    tensors: tuple[Tensor, ...] = (WEIGHT,),
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: bytes = bytes(64),
    magic: bytes = b"GGUF",
) -> bytes:
    entries = (ARCHITECTURE, *entries)
    head = magic + struct.pack("<I", version)
    head += struct.pack("<QQ", *(counts or (len(tensors), len(entries)))) + b"".join(entries)
    for name, dimensions, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        head += struct.pack("<IQ", kind, offset)
    return head + bytes(-len(head) % 32) + data


def block_count(count: int) -> bytes:
    return entry("llama.block_count", U32, struct.pack("<I", count))


def test_a_sound_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    words = array("words", STRING, 2, text("a") + text("é"))
    path.write_bytes(gguf(block_count(1), words, array("bytes", U8, 3, b"\1\2\3")))
    header = read_gguf_header(path)
    assert header.metadata["words"] == ["a", "é"]
    assert header.metadata["bytes"] == [1, 2, 3]
    [tensor] = header.tensors
    assert (tensor.name, tensor.shape, tensor.elements, tensor.bytes) == (WEIGHT[0], (2, 8), 16, 64)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(gguf(array("x", U8, HUGE)), f"x takes {HUGE} bytes", id="array"),
        pytest.param(gguf(array("x", STRING, HUGE)), f"{HUGE} values of x", id="array-of-strings"),
        pytest.param(gguf(array("x", ARRAY, HUGE)), f"{HUGE} values of x", id="array-of-arrays"),
        pytest.param(gguf(array("x", 99, 1)), "type 99", id="array-of-nothing"),
        pytest.param(
            gguf(entry("x", ARRAY, struct.pack("<IQ", ARRAY, 1) * 9)), "type 9", id="nested"
        ),
        pytest.param(gguf(entry("x", STRING, struct.pack("<Q", HUGE))), "x takes", id="string"),
        pytest.param(gguf(counts=(1, HUGE)), f"{HUGE} metadata entries", id="entries"),
        pytest.param(gguf(counts=(HUGE, 1)), f"{HUGE} tensors", id="tensors"),
        pytest.param(gguf(counts=(1, 1 << 63)), "metadata entries", id="entries-2^63"),
        pytest.param(gguf(tensors=(("t", [8] * 5, 0, 0),)), "5 dimensions", id="rank"),
        pytest.param(gguf(tensors=(("t", [8, HUGE], 0, 0),)), "cut off", id="shape"),
        pytest.param(gguf(tensors=(("t", [HUGE] * 4, 0, 0),)), "cut off", id="overflow"),
        pytest.param(gguf(tensors=(("t", [8, 0], 0, 0),)), "cannot be", id="empty"),
        pytest.param(gguf(tensors=(("t", [], 0, 0),)), "cannot be", id="scalar"),
        pytest.param(gguf(tensors=(("t", [8], 2, 0),)), "cannot be", id="part-of-a-block"),
        pytest.param(gguf(tensors=(("t", [8], 999, 0),)), "type 999", id="type"),
        pytest.param(gguf(tensors=(("t", [8], 0, HUGE),)), "cut off", id="offset"),
        pytest.param(gguf(tensors=(WEIGHT, ("t", [16], 0, 0))), "inside another", id="overlap"),
        pytest.param(gguf(tensors=(WEIGHT, WEIGHT)), "twice|inside", id="tensor-twice"),
        pytest.param(gguf(ARCHITECTURE), "twice", id="key-twice"),
        pytest.param(gguf(entry("general.alignment", U32, bytes(4))), "alignment", id="alignment"),
        pytest.param(gguf(block_count(1 << 30)), "the tensors have 1 blocks", id="layers"),
        pytest.param(
            gguf(entry("llama.vocab_size", U32, struct.pack("<I", 1 << 31))),
            "no dimension over 8",
            id="vocabulary",
        ),
        pytest.param(gguf(data=bytes(63)), "cut off", id="last-byte"),
        pytest.param(gguf(version=1), "version 1 cannot", id="version"),
        pytest.param(gguf(version=3 << 24), "big-endian", id="big-endian"),
        pytest.param(gguf(magic=b"PK\3\4"), "it begins with", id="magic"),
        pytest.param(b"GGUF", "too short", id="short"),
        pytest.param(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:", "Git LFS pointer", id="lfs"
        ),
    ],
)
def test_what_cannot_be_is_refused_at_once(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    started = time.thread_time()
    with pytest.raises(ModelLoadFailed, match=rf"bad\.gguf is not a sound GGUF file: .*({reason})"):
        read_gguf_header(path)
    assert time.thread_time() - started < 5


def test_no_cut_of_a_sound_file_passes(tmp_path: Path) -> None:
    whole = gguf(block_count(1), array("words", STRING, 2, text("a") + text("b")))
    path = tmp_path / "cut.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelLoadFailed, match="not a sound GGUF file"):
            read_gguf_header(path)
