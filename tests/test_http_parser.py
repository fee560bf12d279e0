"""Where a request ends: found in the bytes as they come, as gunicorn's own parser would find it."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.http.errors import ParseException
from gunicorn.http.parser import RequestParser

from transformers_api.errors import HeadersTooLarge, InvalidRequest, UriTooLong
from transformers_api.server.http_parser import MAX_HEAD_BYTES, MAX_LINE, RequestBuffer, Uploads

BODY = b'{"prompt": "\r\n\r\n0\r\n\r\n"}'
POST = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE = {
    "without a body": b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n",
    "with a length": POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY,
    "with odd spelling": POST + b"cOnTeNt-LeNgTh:%d  \r\n\r\n" % len(BODY) + BODY,
    "with an empty body": POST + b"Content-Length: 0\r\n\r\n",
    "in chunks": CHUNKED + b"5\r\n0\r\n\r\n\r\nA;name=v\r\n0123456789\r\n0\r\n\r\n",
    "in chunks, with a trailer": CHUNKED + b"1\r\nx\r\n000\r\nChecked: yes\r\n\r\n",
}


def incoming(max_body: int = 1 << 20) -> RequestBuffer:
    return RequestBuffer(max_body)


@pytest.mark.parametrize("request_", WHOLE.values(), ids=WHOLE)
def test_a_request_is_complete_with_its_last_byte_and_not_before(request_: bytes) -> None:
    for size in (1, 7):
        found = incoming()
        for at in range(0, len(request_) - 1, size):
            found.feed(request_[at : min(at + size, len(request_) - 1)])
            assert not found.is_complete
        found.feed(request_[-1:])
        assert found.is_complete
        assert found.whole == (request_ if b"chunked" not in request_ else whole(request_))


def whole(request_: bytes) -> bytes:
    found = incoming()
    found.feed(request_)
    assert found.is_complete
    return found.whole


def parsed(request_: bytes) -> Any:
    """What gunicorn makes of it."""
    return next(RequestParser(Config(), iter([request_]), ("127.0.0.1", 1)))


@pytest.mark.parametrize("request_", WHOLE.values(), ids=WHOLE)
def test_gunicorn_reads_the_same_request_and_leaves_the_next(request_: bytes) -> None:
    ours = parsed(whole(request_ + b"GET /next"))
    assert ours.body.read() == parsed(request_).body.read()
    assert ours.unreader.buf.getvalue() == b"GET /next"


def test_a_body_in_chunks_gets_a_length() -> None:
    for end in (b"0\r\n\r\n", b"000;x\r\nChecked: yes\r\n\r\n"):
        request_ = CHUNKED + b"5\r\n0\r\n\r\n\r\nA;name=v\r\n0123456789\r\n" + end
        assert whole(request_) == POST + b"Content-Length: 15\r\n\r\n0\r\n\r\n0123456789"


def test_random_chunks_are_put_together_wherever_they_are_cut() -> None:
    chance = random.Random(7)
    for _ in range(300):
        chunks = [chance.randbytes(chance.randint(1, 40)) for _ in range(chance.randint(0, 5))]
        text = b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"
        found = incoming()
        found.feed(CHUNKED)
        cuts = sorted(chance.randint(0, len(text) - 1) for _ in range(3))
        for start, end in zip([0, *cuts], [*cuts, len(text) - 1], strict=True):
            found.feed(text[start:end])
            assert not found.is_complete
        found.feed(text[-1:])
        assert found.is_complete
        assert found.whole.endswith(b"\r\n\r\n" + b"".join(chunks))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"five\r\n", id="a size that is no number"),
        pytest.param(b"+5\r\n", id="a sign"),
        pytest.param(b"0x5\r\n", id="a prefix"),
        pytest.param(b"1_0\r\n", id="an underscore"),
        pytest.param(b"\r\n", id="no size"),
        pytest.param(b"1;" + b"x" * 300, id="an endless line"),
        pytest.param(b"1\r\nxx\r\n", id="more than the size"),
    ],
)
def test_chunks_that_are_none_are_refused(text: bytes) -> None:
    found = incoming()
    found.feed(CHUNKED)
    with pytest.raises(InvalidRequest, match="not in chunks"):
        found.feed(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(POST + b"Content-Length: -1\r\n\r\n", "'-1'", id="a negative length"),
        pytest.param(POST + b"Content-Length: 9e9\r\n\r\n", "'9e9'", id="a length that is none"),
        pytest.param(POST + b"Content-Length: \r\n\r\n", "''", id="an empty length"),
        pytest.param(
            POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n", "once", id="two lengths"
        ),
        pytest.param(POST + b"Transfer-Encoding: gzip\r\n\r\n", "'gzip'", id="another coding"),
        pytest.param(
            POST + b"Transfer-Encoding: identity, chunked\r\n\r\n", "chunked'", id="two codings"
        ),
        pytest.param(
            CHUNKED[:-2] + b"Transfer-Encoding: chunked\r\n\r\n", "once", id="chunked twice"
        ),
        pytest.param(CHUNKED.replace(b"1.1", b"1.0"), "HTTP/1.1", id="chunks in HTTP/1.0"),
        pytest.param(
            CHUNKED[:-2] + b"Content-Length: 5\r\n\r\n", "together", id="a length and chunks"
        ),
        pytest.param(
            POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n", "header", id="a folded line"
        ),
        pytest.param(
            POST + b"Transfer-Encoding : chunked\r\n\r\n", "header", id="a blank before the colon"
        ),
        pytest.param(
            POST + b"Transfer-Encoding: chunked\x0b\r\n\r\n", "header", id="a control character"
        ),
        pytest.param(POST + b"nonsense\r\n\r\n", "header", id="a line without a colon"),
    ],
)
def test_a_head_whose_body_has_no_certain_length_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        incoming().feed(text)


@pytest.mark.parametrize("host", [b"", b"h", b"h:80", b"[::1]:5000", b"a_b.example.org"])
def test_a_request_names_its_host_once(host: bytes) -> None:
    line, field = b"GET / HTTP/1.1\r\n", b"Host: %b\r\n" % host
    text = line + field + b"\r\n"
    assert whole(text) == text
    for other in (line, line + field + field, line + b"Host: h, h x\r\n", line + b"Host: h/@\r\n"):
        with pytest.raises(InvalidRequest, match="Host"):
            incoming().feed(other + b"\r\n")


def test_only_http_1_1_has_to_name_a_host() -> None:
    assert whole(b"GET / HTTP/1.0\r\n\r\n") == b"GET / HTTP/1.0\r\n\r\n"
    with pytest.raises(InvalidRequest, match="once"):
        incoming().feed(b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n")


@pytest.mark.parametrize("length", [b"99999999", b"9" * 200])
def test_a_body_that_is_too_long_is_not_waited_for(length: bytes) -> None:
    text = POST + b"Content-Length: %b\r\n\r\n" % length
    assert whole(text) == text


def test_one_empty_line_before_a_request_is_no_part_of_it() -> None:
    for cut in (1, 2, 3):
        found = incoming()
        text = b"\r\n" + CHUNKED + b"1\r\nx\r\n0\r\n\r\n"
        found.feed(text[:cut])
        found.feed(text[cut:])
        assert found.whole == POST + b"Content-Length: 1\r\n\r\nx"


PIECES = [
    *[b"Content-Length: %b" % value for value in (b"3", b"0", b"+3", b"3,3", b"\xb2", b"03")],
    *[
        b"Transfer-Encoding: %b" % value
        for value in (b"chunked", b"Chunked", b"identity", b"gzip, chunked", b"chunked, chunked")
    ],
    *[b"transfer-encoding:chunked", b"Transfer-Encoding : chunked", b"Transfer_Encoding: chunked"],
    *[b" chunked", b"\tchunked", b"X: y", b"X:", b": y", b"X", b"Expect: 100-continue"],
    *[b"Host: other", b"Connection: close", b"Content-Length", b"X: \x00", b"X: a\nb", b"\xff: y"],
]
LINES = [
    b"POST /a HTTP/1.1",
    b"POST /a HTTP/1.0",
    b"GET / HTTP/1.1",
    b"\r\nPOST /a HTTP/1.1",
    b"POST",
]


class Waits(Exception):
    """Gunicorn would have waited for the client."""


CONFIG = Config()
REFUSED, WAITS = "refused", "waits"


def verdict_of_gunicorn(request_: bytes) -> bytes | str:
    """Body that gunicorn reads where these bytes are all that the client ever sends."""

    def bytes_of_the_client():
        yield request_
        raise Waits

    try:
        found = next(RequestParser(CONFIG, bytes_of_the_client(), ("127.0.0.1", 1)))
        framed = any(name in ("CONTENT-LENGTH", "TRANSFER-ENCODING") for name, _ in found.headers)
        return found.body.read(100) if framed else b""  # nobody reads what was not announced
    except ParseException:
        return REFUSED
    except Waits:
        return WAITS


def verdict_of_ours(request_: bytes) -> bytes | str:
    """The same, of gunicorn behind the buffer."""
    found = incoming()
    try:
        found.feed(request_)
    except InvalidRequest:
        return REFUSED
    return verdict_of_gunicorn(found.whole) if found.is_complete else WAITS


def test_gunicorn_never_waits_behind_the_buffer_and_reads_the_same_bodies_as_alone() -> None:
    chance = random.Random(11)
    verdicts = Counter()
    for _ in range(3000):
        fields = chance.choices(PIECES, k=chance.choice((0, 1, 1, 1, 2, 2, 3)))
        head = b"\r\n".join([chance.choice(LINES), b"Host: h", *fields]) + b"\r\n\r\n"
        request_ = head + chance.choice([b"abc", b"3\r\nabc\r\n0\r\n\r\n", b"", b"1\r\na\r\n"])
        alone, ours = verdict_of_gunicorn(request_), verdict_of_ours(request_)
        if ours == REFUSED and alone != REFUSED:  # of these only ``chunked`` is understood
            assert b"identity" in head or b"gzip" in head or b"Host: other" in head
        elif ours == WAITS:  # until it is whole, or too late
            assert alone in (WAITS, REFUSED)
        else:
            assert ours == alone
        verdicts[ours if isinstance(ours, str) else "read"] += 1
    assert min(verdicts[key] for key in (REFUSED, WAITS, "read")) > 100


@pytest.mark.parametrize("chunk", [b"fffffff\r\n", b"1\r\nx\r\n" * 1001, b"3e9\r\n"])
def test_chunks_beyond_the_limit_become_a_length_beyond_the_limit(chunk: bytes) -> None:
    found = incoming(max_body=1000)
    found.feed(CHUNKED + chunk)
    assert found.is_complete
    assert b"\r\nContent-Length: 1001\r\n" in found.whole


def test_an_endless_trailer_is_refused() -> None:
    found = incoming()
    with pytest.raises(HeadersTooLarge):
        found.feed(CHUNKED + b"0\r\n" + b"a: b\r\n" * 2000)


@pytest.mark.parametrize(("max_body", "most"), [(1 << 20, 4096), (1 << 22, 1 << 14)])
def test_a_body_may_not_come_in_endless_small_chunks(max_body: int, most: int) -> None:
    found = incoming(max_body)
    found.feed(CHUNKED)
    found.feed(b"1\r\nx\r\n" * most)
    with pytest.raises(InvalidRequest, match=f"more than {most} chunks"):
        found.feed(b"1\r\nx\r\n")


def test_a_long_request_line_is_refused() -> None:
    found = incoming()
    with pytest.raises(UriTooLong):
        found.feed(b"GET /" + b"a" * (MAX_LINE + 10))


def test_long_headers_are_refused() -> None:
    found = incoming()
    found.feed(POST)
    found.feed(b"X: %b\r\n" % (b"a" * (MAX_HEAD_BYTES - 100)))
    with pytest.raises(HeadersTooLarge):
        found.feed(b"X: %b\r\n" % (b"a" * 100))
    assert found.head.path == "/v1/completions"


def test_a_client_that_waits_for_a_word_before_the_body_is_known() -> None:
    found = incoming()
    found.feed(POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    assert found.expects_continue
    assert not found.is_complete


def test_what_is_put_below_some_paths_may_be_longer():
    uploads = Uploads({"/inspect/lenses/": 100}, lambda head: head.field(b"x-api-key") != "wrong")
    for line, is_awaited in (("PUT /inspect/lenses/x", True), ("PUT /inspect/vectors/x", False)):
        buffer = RequestBuffer(10, uploads)
        buffer.feed(f"{line} HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n".encode())
        assert buffer.is_complete != is_awaited
        buffer.feed(b"x" * 50)
        assert buffer.is_complete
    buffer = RequestBuffer(10, uploads)
    buffer.feed(b"PUT /inspect/lenses/x HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n")
    assert buffer.is_complete  # and refused by its length


@pytest.mark.parametrize("framing", ["Content-Length: 50", "Transfer-Encoding: chunked"])
def test_whoever_may_not_send_more_is_not_waited_for(framing):
    uploads = Uploads({"/inspect/lenses/": 100}, lambda head: head.field(b"x-api-key") == "right")
    for key in ("right", "wrong"):
        buffer = RequestBuffer(10, uploads)
        head = f"PUT /inspect/lenses/x HTTP/1.1\r\nHost: h\r\nX-API-Key: {key}\r\n{framing}\r\n\r\n"
        buffer.feed(head.encode() + b"32\r\n")
        assert buffer.is_complete == (key == "wrong")
        assert buffer.is_upload == (key == "right")
