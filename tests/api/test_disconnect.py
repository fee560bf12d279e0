from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from tests import descriptors
from tests.servers import Server, serving
from transformers_api.api.http import disconnect
from transformers_api.api.http.disconnect import DisconnectWatcher

WAIT_S = 30.0


class Connection:
    """A client and its server's side, over loopback."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.client = socket.create_connection(listener.getsockname())
            self.server, _ = listener.accept()
        self.environ = {"gunicorn.socket": self.server, "SERVER_PROTOCOL": "HTTP/1.1"}

    def close(self) -> None:
        self.client.close()
        self.server.close()


@pytest.fixture(scope="module")
def watcher() -> DisconnectWatcher:
    return DisconnectWatcher()


@pytest.fixture
def connection() -> Iterator[Connection]:
    connection = Connection()
    yield connection
    connection.close()


def leave_quietly(client: socket.socket) -> None:
    client.close()


def leave_abruptly(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()  # a reset


@pytest.mark.parametrize("leave", [leave_quietly, leave_abruptly])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_client_that_leaves_is_noticed(
    watcher: DisconnectWatcher, connection: Connection, leave: object, when: str
) -> None:
    assert callable(leave)
    gone = threading.Event()
    if when == "before":
        leave(connection.client)
    with watcher.watch(connection.environ, gone.set):
        if when == "after":
            assert not gone.is_set()
            leave(connection.client)
        assert gone.wait(WAIT_S)


def test_a_client_that_only_sends_no_more_is_asked_once_and_served(
    watcher: DisconnectWatcher, connection: Connection
) -> None:
    gone = threading.Event()
    with watcher.watch(connection.environ, gone.set):
        connection.client.shutdown(socket.SHUT_WR)
        assert connection.client.recv(100) == disconnect.PROBE
        connection.server.sendall(b"the answer")
        assert connection.client.recv(100) == b"the answer"
        assert not gone.is_set()
        connection.client.close()
        connection.server.sendall(b"more")  # is answered with a reset
        assert gone.wait(WAIT_S)


def test_nothing_is_put_into_an_answer_that_is_being_written(
    watcher: DisconnectWatcher, connection: Connection
) -> None:
    gone = threading.Event()
    with watcher.watch(connection.environ, gone.set) as watch:
        watch.answer_begins()
        connection.client.shutdown(socket.SHUT_WR)
        other, others = Connection(), threading.Event()
        with watcher.watch(other.environ, others.set):
            other.close()
            assert others.wait(WAIT_S)  # by now the first has been looked at
        connection.server.sendall(b"an event")
        assert connection.client.recv(100) == b"an event"
        assert not gone.is_set()
        connection.client.close()
        connection.server.sendall(b"another")
        assert gone.wait(WAIT_S)


def test_half_a_client_of_http_1_0_is_none(
    watcher: DisconnectWatcher, connection: Connection
) -> None:
    gone = threading.Event()
    with watcher.watch(connection.environ | {"SERVER_PROTOCOL": "HTTP/1.0"}, gone.set):
        connection.client.shutdown(socket.SHUT_WR)
        assert gone.wait(WAIT_S)
    connection.server.close()
    assert connection.client.recv(100) == b""


def test_data_is_not_taken_for_leaving(watcher: DisconnectWatcher, connection: Connection) -> None:
    told: list[str] = []
    other = Connection()
    gone = threading.Event()
    with (
        watcher.watch(connection.environ, lambda: told.append("data")),
        watcher.watch(other.environ, gone.set),
    ):
        connection.client.sendall(b"a second request")
        connection.server.sendall(b"an answer")
        other.close()
        assert gone.wait(WAIT_S)  # by now the first would have been told too
    assert told == []


def test_after_the_end_of_a_request_nobody_is_told(
    watcher: DisconnectWatcher, connection: Connection
) -> None:
    told: list[str] = []
    watch = watcher.watch(connection.environ, lambda: told.append("first"))
    watch.close()
    watch.close()
    gone = threading.Event()
    with watcher.watch(connection.environ, gone.set):
        connection.client.close()
        assert gone.wait(WAIT_S)
    assert told == []


def test_the_client_is_told_of_once(watcher: DisconnectWatcher, connection: Connection) -> None:
    told: list[str] = []
    gone = threading.Event()
    with watcher.watch(connection.environ, lambda: told.append("x")):
        connection.client.close()
        with watcher.watch(connection.environ, gone.set):
            assert gone.wait(WAIT_S)
    assert told == ["x"]


def test_a_callback_that_raises_does_not_end_the_watcher(
    watcher: DisconnectWatcher, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    def explode() -> None:
        raise ZeroDivisionError

    with watcher.watch(connection.environ, explode):
        connection.client.close()
        other, gone = Connection(), threading.Event()
        with watcher.watch(other.environ, gone.set):
            other.close()
            assert gone.wait(WAIT_S)
    assert "failed" in caplog.text


def test_an_event_that_comes_late_is_not_put_down_to_the_next_request(
    watcher: DisconnectWatcher, connection: Connection
) -> None:
    """The number of a closed descriptor is given out again while its event is on the way."""
    told: list[str] = []
    other = Connection()
    with watcher.watch(connection.environ, lambda: told.append("wrong")):
        fd = next(iter(watcher._clients))
        assert watcher._take(fd) is None
    other.close()
    assert told == []


def test_without_a_socket_there_is_nothing_to_watch(watcher: DisconnectWatcher) -> None:
    with watcher.watch({}, pytest.fail):
        pass


def watcher_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "disconnect-watcher"}


def test_without_epoll_nothing_is_watched(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disconnect, "HAS_EPOLL", False)
    watchers = watcher_threads()
    with DisconnectWatcher().watch(connection.environ, pytest.fail):
        connection.client.close()
    assert watcher_threads() == watchers


def test_two_hundred_requests_leave_no_descriptor_behind(
    watcher: DisconnectWatcher, connection: Connection
) -> None:
    watcher.watch(connection.environ, lambda: None).close()  # the thread is there now
    before = descriptors.held()
    for index in range(200):
        connection, gone = Connection(), threading.Event()
        with watcher.watch(connection.environ, gone.set):
            if index % 2:
                connection.client.close()
                assert gone.wait(WAIT_S)
        connection.close()
    assert descriptors.left_since(before) == set()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("tests.streaming_app:create_watched_app") as server:
        yield server


@pytest.mark.parametrize("kind", ["plain", "silent", "streaming"])
def test_gunicorn_learns_at_once_that_a_client_left(server: Server, kind: str) -> None:
    """Before the answer, before the first byte of a stream, and in the middle of one."""
    client = socket.create_connection(server.address())
    client.sendall(f"GET /wait/{kind} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert server.get(f"/begun/{kind}") == "True"
    if kind == "streaming":
        assert client.recv(4096)
    client.close()
    assert server.get(f"/left/{kind}") == "True"
