"""Connections of a gunicorn worker: requests are gathered without threads, then handed to one.

Gunicorn's own gthread worker gives a thread to a connection as soon as it sends its first byte,
and another two seconds of its main loop to each that is closed while the client still sends: a
few clients that send slowly, or nothing, would stop the whole server. Here the main loop gathers
the bytes of all connections; a thread sees complete requests only, and what the kernel can end it
ends: a client that does not read, or is gone without a word.
"""

from __future__ import annotations

import errno
import logging
import selectors
import socket
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from gunicorn.workers.gthread import TConn, ThreadWorker  # type: ignore[import-untyped]

from transformers_api.errors import ApiError, Overloaded, RequestTimeout
from transformers_api.server import refusals, sockets
from transformers_api.server.gathered_body import read_at_once
from transformers_api.server.http_parser import NO_UPLOADS, RequestBuffer, RequestHead, Uploads
from transformers_api.server.large_body import FIRST_BYTES, LargeBody, UnsentBody

LINGER_S = 2.0  # a client may still be sending what nobody reads; it is to see the answer first
LINGER_BYTES = 1 << 20
DRAIN_S = 0.05  # for bytes that are here and that the application did not want
LOOK_S = 0.25  # between two looks at who has been waiting too long
MAX_WAITING_BYTES = 256 << 20  # of requests that are not complete, all together
READ_BYTES = 1 << 16
MOST_UPLOADING = MAX_WAITING_BYTES * 3 // 4  # of several: each is in memory several times over
UPLOADING = "Other large files are on their way already"
PROBES = (b"GET /health ", b"GET /healthz ", b"GET /readyz ", b"GET /metrics ")
PROBE_THREADS = 4
MAX_BODY_BYTES = 2 << 20  # where the application names no other limit

log = logging.getLogger(__name__)


class PendingRequest:
    """A connection that no thread works for."""

    def __init__(self, incoming: RequestBuffer | None, until: float) -> None:
        self.incoming = incoming  # None: it is being closed, and what comes is thrown away
        self.began = time.monotonic()  # of its first byte, once that has come
        self.until = until  # time.monotonic()
        self.thrown_away = 0

    @property
    def size(self) -> int:
        """Bytes that are kept for it."""
        return 0 if self.incoming is None else len(self.incoming)


class GatheringWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """A gthread worker whose threads wait for no client, but for the reading of answers.

    ``receive_s``: what a whole request may take from its first byte on. ``send_s``: after so long
    a client that reads nothing is given up. The application may have settings for them.
    """

    wsgi: Any  # what threads call: the application, whose large answers they do not wait for

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.receive_s = 30.0
        self.send_s = 20.0
        self._waiting: dict[TConn, PendingRequest] = {}  # the one that came first is the first
        self._bytes = 0
        self._looked = 0.0
        self._max_body = MAX_BODY_BYTES
        self._uploads = NO_UPLOADS
        self._uploading: dict[socket.socket, int] = {}  # bytes; from the head on to the answer
        self._origins: tuple[str, ...] = ()
        self._application: Any = None  # the WSGI application, once it is loaded
        self._bodies: dict[socket.socket, LargeBody] = {}  # of those with a thread
        self._sending: dict[TConn, UnsentBody] = {}
        self._heads: dict[socket.socket, tuple[RequestHead, float]] = {}  # of those with a thread

    def init_process(self) -> None:
        """Gunicorn's, with a few threads more for those who ask whether the server lives."""
        self._probes = ThreadPoolExecutor(PROBE_THREADS, thread_name_prefix="probe")
        super().init_process()

    def load_wsgi(self) -> None:
        """Load the application; it says how long a body may be, and how long it may take."""
        super().load_wsgi()
        refusals.load()
        self._application, self.wsgi = self.wsgi, self._answer
        settings = getattr(self.services, "settings", None)
        if settings is not None:
            self.receive_s, self.send_s = settings.receive_timeout_s, settings.send_timeout_s
            self._origins = settings.cors_allow_origins
        config = getattr(self._application, "config", {})
        self._max_body = config.get("MAX_CONTENT_LENGTH") or MAX_BODY_BYTES
        if "UPLOADS" in config:
            self._uploads = Uploads(config["UPLOADS"], config["MAY_UPLOAD"])

    @property
    def services(self) -> Any:
        """The application's services; None for another application."""
        return getattr(self._application, "extensions", {}).get("transformers_api")

    # -- gathering ----------------------------------------------------------------------------

    def accept(self, listener: socket.socket) -> None:
        """Take a new connection; when there are too many, the one that has waited longest goes."""
        if self.cfg.is_ssl or self.cfg.http2_cleartext != "off":
            super().accept(listener)  # only a thread can read these
            return
        if self.nr_conns >= self.worker_connections - 1:
            self._drop_oldest()
        try:
            client, address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._drop_oldest()
            elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                raise
            return
        self.nr_conns += 1
        conn = TConn(self.cfg, client, address, listener.getsockname())
        sockets.limit(client, self.send_s)
        self._gather(conn, b"")

    def _gather(self, conn: TConn, sent: bytes) -> None:
        """Wait for the next request; ``sent`` is what came of it with the one before."""
        conn.sock.setblocking(False)
        waiting = PendingRequest(
            RequestBuffer(self._max_body, self._uploads), self._now() + self.cfg.keepalive
        )
        self._waiting[conn] = waiting
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._read, conn))
        if sent:
            self._take(conn, waiting, sent)

    def _read(self, conn: TConn, _: Any) -> None:
        waiting = self._waiting.get(conn)
        if waiting is None:  # dropped, to make room, since the poller saw its bytes
            return
        try:
            data = conn.sock.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(conn)
        elif waiting.incoming is None:
            waiting.thrown_away += len(data)
            if waiting.thrown_away > LINGER_BYTES:
                self._drop(conn)
        else:
            self._take(conn, waiting, data)

    def _take(self, conn: TConn, waiting: PendingRequest, data: bytes) -> None:
        incoming = waiting.incoming
        assert incoming is not None
        if not waiting.size:
            waiting.began = self._now()
            waiting.until = waiting.began + self.receive_s
        self._bytes -= waiting.size
        try:
            incoming.feed(data)
        except ApiError as error:
            self._bytes += waiting.size
            self._refuse(conn, error)
            return
        self._bytes += waiting.size
        if incoming.is_upload and conn.sock not in self._uploading:
            if self._uploading and incoming.most + sum(self._uploading.values()) > MOST_UPLOADING:
                return self._refuse(conn, Overloaded(UPLOADING, retry_after=5))
            self._uploading[conn.sock] = incoming.most
        if incoming.is_complete:
            self._when_writable(conn, waiting)
        elif incoming.expects_continue:
            incoming.expects_continue = False
            self._send(conn, b"HTTP/1.1 100 Continue\r\n\r\n")
        while self._bytes > MAX_WAITING_BYTES:
            self._drop_oldest()

    def _when_writable(self, conn: TConn, waiting: PendingRequest) -> None:
        """Hand a whole request over, once its client has read what was sent before.

        A thread has to find room for the head of its answer at once.
        """
        if self._waiting.get(conn) is not waiting:
            return
        if not sockets.is_writable(conn.sock):
            waiting.until = self._now() + self.send_s
            self.poller.modify(
                conn.sock,
                selectors.EVENT_WRITE,
                lambda _: self._when_writable(conn, waiting),
            )
            return
        assert waiting.incoming is not None
        self._heads[conn.sock] = waiting.incoming.head, waiting.began
        self._hand_over(conn, waiting.incoming.whole)

    def _hand_over(self, conn: TConn, request: bytes) -> None:
        self._forget(conn)
        conn.data_ready = True
        conn.init()
        conn.parser.unreader.unread(request)
        pool = self._probes if request.startswith(PROBES) else self.tpool
        future = pool.submit(self.handle, conn)
        future.add_done_callback(
            lambda done: self.method_queue.defer(self.finish_request, conn, done)
        )

    # -- answering ----------------------------------------------------------------------------

    def handle_request(self, req: Any, conn: TConn) -> Any:
        """Gunicorn's; a client that does not read is one that has left."""
        req._expected_100_continue = False  # it was told so when its headers had come
        try:
            return super().handle_request(req, conn)
        except (BlockingIOError, TimeoutError):
            log.info("A client read nothing for %g s; its answer has ended", self.send_s)
            raise BrokenPipeError(errno.EPIPE, "the client does not read") from None

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """The application's answer; a large one with a length is not waited for by its thread."""
        length = 0

        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            nonlocal length
            for name, value in headers:
                if name.lower() == "content-length":
                    length = int(value)
            return start_response(status, headers, *error)

        read_at_once(environ)
        body: Iterable[bytes] = self._application(environ, start)
        sock = environ["gunicorn.socket"]
        if length <= FIRST_BYTES or environ["REQUEST_METHOD"] == "HEAD" or self.cfg.is_ssl:
            return body
        self._bodies[sock] = LargeBody(body, sock, length)
        return self._bodies[sock]

    def _keepalive_after(self, conn: TConn, keepalive: bool) -> bool:
        """True where the connection can be used again: not while a body is on its way."""
        return keepalive and bool(conn.parser.finish_body(deadline=self._now() + DRAIN_S))

    def handle_error(self, req: Any, client: Any, addr: Any, exc: BaseException) -> None:
        """Answer what cannot be read, or has failed below the application, with JSON."""
        error = refusals.api_error(exc)
        self._count(error)
        head, began = self._heads.get(client) or (RequestHead(b""), self._now())
        try:
            client.sendall(refusals.page(error, head, began, self._origins))
        except OSError:
            log.debug("A client did not wait for its error")

    def finish_request(self, conn: TConn, fs: Future[Any]) -> None:
        """After a response: wait for the next request, or close."""
        self._heads.pop(conn.sock, None)
        self._uploading.pop(conn.sock, None)
        body = self._bodies.pop(conn.sock, None)
        if conn.is_http2 or self.cfg.is_ssl or self.cfg.http2_cleartext != "off":
            super().finish_request(conn, fs)
            return
        keep = not fs.cancelled() and not fs.exception() and bool(fs.result())
        if body is not None and body.is_left:
            self._send_later(conn, body, keep)
        else:
            self._end_request(conn, keep)

    def _end_request(self, conn: TConn, keep: bool) -> None:
        try:
            if keep:
                self._gather(conn, conn.parser.unreader.take_buffered())
            else:
                self._linger(conn)
        except OSError:
            self._drop(conn)

    def _send_later(self, conn: TConn, body: LargeBody, keep: bool) -> None:
        self._sending[conn] = UnsentBody(body, keep, self._now() + self.send_s)
        conn.sock.setblocking(False)
        self.poller.register(conn.sock, selectors.EVENT_WRITE, partial(self._send_rest, conn))

    def _send_rest(self, conn: TConn, _: Any) -> None:
        unsent = self._sending.get(conn)
        if unsent is None:
            return
        try:
            if not unsent.body.send():
                unsent.until = min(self._now() + self.send_s, unsent.end)
                return
        except OSError:
            log.info("A client has left, or read nothing for %g s", self.send_s)
            self._give_up(conn)
            return
        except Exception:
            log.exception("The rest of an answer failed")
            self._give_up(conn)
            return
        self._end_sending(conn)
        self._end_request(conn, unsent.keep)

    def _end_sending(self, conn: TConn) -> None:
        self.poller.unregister(conn.sock)
        self._sending.pop(conn).body.end()

    def _give_up(self, conn: TConn) -> None:
        """End an answer that its client does not take."""
        self._end_sending(conn)
        self._drop(conn)

    def _refuse(self, conn: TConn, error: ApiError) -> None:
        waiting = self._waiting[conn]
        assert waiting.incoming is not None
        log.info("Refused a request before it was complete: %s", error)
        self._count(error)
        head = waiting.incoming.head
        self._send(conn, refusals.page(error, head, waiting.began, self._origins))
        self._linger(conn)

    def _count(self, error: ApiError) -> None:
        metrics = getattr(self.services, "metrics", None)
        if metrics is not None:
            metrics.on_refusal(error)

    def _send(self, conn: TConn, data: bytes) -> None:
        try:
            conn.sock.send(data)  # the buffer of a connection that waits is empty
        except OSError:
            log.debug("A client did not wait for its answer")

    # -- closing ------------------------------------------------------------------------------

    def _linger(self, conn: TConn) -> None:
        """Close once the client has seen the answer: at once, an unread byte would take it away."""
        self._uploading.pop(conn.sock, None)
        if conn in self._waiting:
            self._forget(conn)
        conn.sock.setblocking(False)
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(conn)
            return
        self._waiting[conn] = PendingRequest(None, self._now() + LINGER_S)
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self._read, conn))

    def _drop(self, conn: TConn) -> None:
        if conn in self._waiting:
            self._forget(conn)
        self._uploading.pop(conn.sock, None)
        self.nr_conns -= 1
        conn.close()

    def _drop_oldest(self) -> None:
        """Of those who have not sent a whole request, else of those who do not read the answer."""
        for oldest in self._waiting:
            log.warning("Too many connections: closed the one that has waited longest")
            return self._drop(oldest)
        for oldest in self._sending:
            log.warning("Too many connections: closed the one that has read longest")
            return self._give_up(oldest)

    def _forget(self, conn: TConn) -> None:
        self._bytes -= self._waiting.pop(conn).size
        self.poller.unregister(conn.sock)

    def murder_pending(self) -> None:
        """Close what has been silent, or on its way, for too long."""
        super().murder_pending()
        now = self._now()
        if now < self._looked + LOOK_S:
            return
        self._looked = now
        overdue = [conn for conn, waiting in self._waiting.items() if waiting.until <= now]
        for conn in overdue:
            if self._waiting[conn].size:
                text = f"The request was not complete after {self.receive_s:g} s"
                self._refuse(conn, RequestTimeout(text))
            else:
                self._drop(conn)
        for conn in [conn for conn, unsent in self._sending.items() if unsent.until <= now]:
            log.info("A client read too slowly; its answer has ended")
            self._give_up(conn)

    def cap_waiting(self, until: float) -> None:
        """Give those who have not sent a whole request so long at most."""
        for waiting in self._waiting.values():
            waiting.until = min(waiting.until, until)
        for conn in self.pending_conns:  # gunicorn's own, with TLS
            conn.timeout = min(conn.timeout, until)

    @staticmethod
    def _now() -> float:
        return time.monotonic()
