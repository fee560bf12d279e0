"""Fixtures for everything: tiny random models, made once per session; no network."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ["RESIDENCY_LOCK"] = "false"  # tests may run beside a server, and beside each other

Measured = Callable[[str], None]


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Measured:
    """Call it with what was found: ``--figures`` shows it, for docs/operations.md."""
    return lambda text: record_property("measured", text)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", action="store_true", help="show what tests have measured")


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
