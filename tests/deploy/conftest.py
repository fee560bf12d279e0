from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deploy.activation import Unit, unit
from tests.deploy.nginx import Proxy


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unit]:
    """One slot and no queue: 33 threads, which half-sent requests would soon occupy."""
    with unit(tmp_path_factory.mktemp("server"), MAX_INFLIGHT="1", MAX_QUEUE="0") as one:
        yield one


@pytest.fixture(scope="module")
def proxy(server: Unit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with Proxy(tmp_path_factory.mktemp("nginx"), server.port).running() as one:
        yield one
