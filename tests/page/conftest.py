"""A real browser in front of real servers: one of each for a session; skipped where no browser is."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect
from playwright.sync_api import sync_playwright as playwright

from tests.served_app import serving
from tests.servers import Server, started

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
AXE_TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
WORDS = ("The", " capital", " of", " France", " is", " Paris", "What", " the", " story", "once")
WAIT_MS = 20_000

Opener = Callable[..., Page]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give a first test the time that its server and its browser take to start."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(120))


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Debian's Chromium without a window."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium is installed; scripts/install_test_tools.sh does it")
    expect.set_options(timeout=WAIT_MS)
    with playwright() as drivers:
        browser = drivers.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def save_models(folder: Path) -> list[dict[str, Any]]:
    """Small random models that attend in all ways the page tells apart, as registry entries."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MambaConfig,
        MambaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )

    from tests import tokenizers

    tokenizer = tokenizers.byte_level(WORDS)
    size = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    size |= {"hidden_size": 32, "num_hidden_layers": 4}
    heads = size | {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    models = {
        "tiny-llama": lambda: LlamaForCausalLM(LlamaConfig(**heads)),
        "tiny-window": lambda: MistralForCausalLM(MistralConfig(**heads, sliding_window=16)),
        "tiny-mamba": lambda: MambaForCausalLM(MambaConfig(**size, state_size=4)),
    }
    entries = []
    for name, make in models.items():
        torch.manual_seed(0)
        model = make()
        for weight in model.parameters():
            weight.data *= 3  # so that it prefers some tokens to others
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        entries.append({"name": name, "path": str(folder / name)})
    entries[0]["embedding"] = {"pooling": "mean"}
    return entries


def environment(folder: Path, entries: list[dict[str, Any]]) -> dict[str, str]:
    """Settings of a server that has these models alone, on a free port of the loopback."""
    (folder / "models.json").write_text(json.dumps(entries))
    return {
        "PORT": "0",
        "HOST": "127.0.0.1",
        "MODEL_REGISTRY_PATH": str(folder / "models.json"),
        "INCLUDE_DEFAULT_MODELS": "false",
        "DEFAULT_MODEL": entries[0]["name"],
        "MODEL_STORE": str(folder / "store"),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TORCH_THREADS": "1",
        "SWAP_AFTER_S": "0.2",
        "RATE_LIMIT_PER_MIN": "0",
        "ENABLE_EMBEDDINGS_BACKEND": "true",
    }


def address(server: Server) -> str:
    host, port = server.address()
    return f"http://{host}:{port}"


@pytest.fixture(scope="package")
def tiny(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with real models: ``tiny-llama``, ``tiny-window``, ``tiny-mamba``."""
    folder = tmp_path_factory.mktemp("page")
    settings = environment(folder, save_models(folder))
    with started(sys.executable, "-m", "transformers_api", "serve", **settings) as server:
        url = address(server)
        server.said("Loaded tiny-llama")
        yield url
        assert "Traceback" not in server.log, server.log


@pytest.fixture(scope="package")
def scripted(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server whose models say what they are told: tests/page/scripted_app.py."""
    folder = tmp_path_factory.mktemp("scripted")
    entries = [{"name": name, "path": str(folder / name)} for name in ("scripted", "other")]
    settings = environment(folder, entries)
    del settings["HF_HOME"], settings["MODEL_STORE"]  # set by `serving`
    with serving(folder, app="tests.page.scripted_app:create_app", **settings) as server:
        server.said("Loaded scripted")
        yield address(server)
        assert "Traceback" not in server.log, server.log


class Watched:
    """What a page must not do: complain in the console, fail, ask another origin."""

    def __init__(self, origin: str, refusals: bool) -> None:
        self.origin = urlsplit(origin).netloc
        self.refusals = refusals
        self.complaints: list[str] = []

    def follow(self, context: BrowserContext) -> None:
        context.on("console", self.console)
        context.on("weberror", lambda error: self.complaints.append(f"page error: {error.error}"))
        context.on("request", self.request)

    def console(self, message: ConsoleMessage) -> None:
        refused = self.refusals and message.text.startswith("Failed to load resource")
        if message.type in ("error", "warning") and not refused:
            self.complaints.append(f"console {message.type}: {message.text}")

    def request(self, request: Request) -> None:
        url = urlsplit(request.url)
        if url.scheme not in ("data", "blob") and url.netloc != self.origin:
            self.complaints.append(f"another origin: {request.url}")


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Opener]:
    """Open a page of a server in a fresh context; the test fails if the page complains.

    ``path`` is what is opened (None: nothing yet, for tests that route first), ``scheme`` light or
    dark, ``size`` of the window, ``refusals`` True where the server refuses something on purpose;
    more are options of a context of playwright.
    """
    opened: list[tuple[BrowserContext, Watched]] = []

    def open_(
        url: str,
        path: str | None = "/ui",
        *,
        scheme: str = "light",
        size: tuple[int, int] = (1280, 800),
        refusals: bool = False,
        **options: Any,
    ) -> Page:
        context = browser.new_context(
            base_url=url,
            color_scheme=scheme,
            viewport={"width": size[0], "height": size[1]},
            locale="en-GB",
            reduced_motion=options.pop("reduced_motion", "reduce"),
            **options,
        )
        context.set_default_timeout(WAIT_MS)
        watched = Watched(url, refusals)
        watched.follow(context)
        opened.append((context, watched))
        page = context.new_page()
        if path is not None:
            page.goto(path)
            if path.startswith("/ui"):
                page.locator("html[data-ready]").wait_for()
        return page

    yield open_
    for context, _ in opened:
        context.close()
    assert [complaint for _, watched in opened for complaint in watched.complaints] == []


def violations(page: Page, within: str = "html") -> list[str]:
    """What axe finds against WCAG 2.0 to 2.2, A and AA: a line each. Needs ``bypass_csp=True``."""
    if not page.evaluate("'axe' in window"):
        source = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text()
        page.evaluate(source + ";undefined")
    options = {"runOnly": {"type": "tag", "values": AXE_TAGS}, "resultTypes": ["violations"]}
    found = page.evaluate("([within, options]) => axe.run(within, options)", [within, options])
    return [
        f"{violation['id']}: {violation['help']}: {node['target']}: {node['failureSummary']}"
        for violation in found["violations"]
        for node in violation["nodes"]
    ]
