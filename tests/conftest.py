"""Fixtures for everything: tiny random models, made once per session; no network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ["RESIDENCY_LOCK"] = "false"  # tests may run beside a server, and beside each other

Measured = Callable[[str], None]


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Measured:
    """Call it with what was found: ``--figures`` shows it, for docs/operations.md."""
    return lambda text: record_property("measured", text)


@pytest.fixture(scope="session")
def native_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the kernels are compiled; skips where they cannot be had."""
    from transformers_api.engine.native.wiring import kernels

    cache = tmp_path_factory.getbasetemp().parent / "native"
    if kernels(cache, 1) is None:
        pytest.skip("no native kernels")
    return cache


@pytest.fixture(scope="session")
def native_default(request: pytest.FixtureRequest) -> Path | None:
    """What engines use unless a test says otherwise."""
    return request.getfixturevalue("native_cache") if request.config.option.native else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", action="store_true", help="show what tests have measured")
    parser.addoption("--native", action="store_true", help="run engines on the native kernels")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if not config.getoption("--figures"):
        return
    terminalreporter.section("figures")
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, text in report.user_properties if report.when == "call" else ():
            if name == "measured":
                terminalreporter.write_line(f"{report.nodeid} {report.outcome}\n    {text}")
