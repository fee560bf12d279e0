"""Fixtures for everything: tiny random models, made once per session; no network."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from werkzeug.routing import Rule

from tests.instruction_sets import distinct
from transformers_api.config.settings import Settings
from transformers_api.kernels.build import build, find
from transformers_api.kernels.variants import NativeUnavailable, choose, usable
from transformers_api.logs import configure_logging

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ["RESIDENCY_LOCK"] = "false"  # tests may run beside a server, and beside each other

NATIVE_CACHE = Settings().native_cache
Measured = Callable[[str], None]


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Measured:
    """Call it with what was found: ``--figures`` shows it, for docs/operations.md."""
    return lambda text: record_property("measured", text)


def pytest_configure(config: pytest.Config) -> None:
    """Compile the kernels before the workers begin, where servers look for them: once for all.

    The log is as a server's from the start: `caplog` sees it also where a test's is the first.
    """
    configure_logging("info")
    if hasattr(config, "workerinput"):
        return
    with contextlib.suppress(NativeUnavailable):
        choose()
        build(NATIVE_CACHE)


def pytest_collection() -> None:
    """Collect no garbage while modules are imported and tests are listed: there is little."""
    gc.disable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadfile`` with the page's files as one: tests/work_units.py."""
    from tests import work_units

    return work_units.WholeFiles(config, log) if config.option.dist == "loadfile" else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give what is slow on a machine of its own the time that it takes beside others."""
    if hasattr(config, "workerinput"):
        from tests import work_units

        work_units.sort(items)
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(300))


def pytest_collection_finish() -> None:
    """Take what was imported out of the collector's sight, as the server does after its start.

    Each engine that closes collects: through all of torch's and transformers' modules in half a
    second, without them in no time.
    """
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def what_other_files_left() -> None:
    """The same for what the tests of other files have imported and keep."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def url_builders() -> Iterator[None]:
    """Compile what builds the URL of a route once, not for each of the thousands of applications.

    Werkzeug compiles two functions per route when it is added, which is most of the time that an
    application takes. They depend on nothing but the rule.
    """
    compile_builder = Rule._compile_builder
    builders: dict[tuple[object, ...], Callable[..., tuple[str, str]]] = {}

    @functools.wraps(compile_builder)
    def shared(rule: Rule, append_unknown: bool = True) -> Callable[..., tuple[str, str]]:
        key = (rule.rule, str(rule.defaults), rule.host, rule.subdomain, append_unknown)
        if key not in builders:
            builders[key] = compile_builder(rule, append_unknown)
        return builders[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rule, "_compile_builder", shared)
        yield


@pytest.fixture(scope="session")
def native_cache() -> Path:
    """Where the compiled kernels are; skips where they cannot be had."""
    from transformers_api.kernels.provider import kernel_provider

    if kernel_provider(NATIVE_CACHE, 1).library() is None:
        pytest.skip("no native kernels")
    return NATIVE_CACHE


@pytest.fixture
def isas(request: pytest.FixtureRequest, native_cache: Path) -> list[str]:
    """The instruction sets that this processor has, with their kernels compiled; the best first.

    For `make test` those that differ.
    """
    own = usable() if request.node.get_closest_marker("slow") else distinct()
    for variant in own:
        build(native_cache, variant=variant)
    return [variant.name for variant in own]


@pytest.fixture(scope="session")
def native_default(request: pytest.FixtureRequest) -> Path | None:
    """What engines use unless a test says otherwise."""
    if request.config.option.torch:
        return None
    try:
        choose()
    except NativeUnavailable:
        return None
    return NATIVE_CACHE if find(NATIVE_CACHE) else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", action="store_true", help="show what tests have measured")
    parser.addoption("--torch", action="store_true", help="run engines without native kernels")


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
