"""How smoothly the page draws while tokens stream in, what it weighs, when it first paints.

    python -m benchmarks.page --tokens-per-s 200

A real Chromium, without a window, and a server that writes at exactly that pace
(benchmarks.page_server). Times between frames, in ms; a frame is late where it came more than 25 ms
after the one before, and a long task is one of more than 50 ms. ``--slower 4`` slows the browser's
main thread as Chromium's developer tools do.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from benchmarks.machine import processor
from benchmarks.page_server import paced

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
LATE_MS = 25
WATCH = """
window.frames_ = [];
window.tasks_ = [];
window.watching_ = false;
new PerformanceObserver((list) => {
  if (window.watching_) for (const { duration } of list.getEntries()) window.tasks_.push(duration);
}).observe({ entryTypes: ["longtask"] });
let last = 0;
const tick = (now) => {
  if (last && window.watching_) window.frames_.push(now - last);
  last = now;
  requestAnimationFrame(tick);
};
requestAnimationFrame(tick);
"""
WEIGHT = """() => {
  const loaded = performance.getEntriesByType("resource");
  const files = loaded.filter(({ name }) => name.includes("/ui/"));
  const all = [...files, performance.getEntriesByType("navigation")[0]];
  const sum = (size) => all.reduce((total, file) => total + file[size], 0);
  const paint = performance.getEntriesByName("first-contentful-paint")[0].startTime;
  return { files: all.length, bytes: sum("decodedBodySize"), sent: sum("encodedBodySize"), paint };
}"""
OPEN_INSIDE = """async () => {
  const begin = performance.now();
  document.getElementById("tab-inside").click();
  await new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)));
  return performance.now() - begin;
}"""


def opened(browser: Browser, url: str, tokens: int, slower: float) -> tuple[BrowserContext, Page]:
    """The page, once the model is known."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, base_url=url)
    settings = json.dumps(json.dumps({"max_tokens": str(tokens)}))
    choose = f"localStorage.setItem('transformers-api.settings', {settings});"
    context.add_init_script(choose + WATCH)
    page = context.new_page()
    page.goto("/ui")
    page.get_by_role("combobox", name="Model").locator("option").first.wait_for(state="attached")
    page.wait_for_load_state("networkidle")
    if slower > 1:
        context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": slower})
    return context, page


def written(page: Page, text: str) -> None:
    """Ask, and wait for the end of the answer."""
    message = page.get_by_role("textbox", name="Message")
    message.fill(text)
    message.press("Enter")
    stop = page.get_by_role("button", name="Stop", exact=True)
    stop.wait_for()
    stop.wait_for(state="hidden", timeout=120_000)


def frames(browser: Browser, url: str, view: str, tokens: int, slower: float) -> str:
    """Write an answer in ``view``: the row of the table about the frames meanwhile."""
    context, page = opened(browser, url, tokens, slower)
    page.get_by_role("tab", name=view).click()
    page.evaluate("window.watching_ = true")
    written(page, "Tell me a story about a lighthouse keeper.")
    page.evaluate("window.watching_ = false")
    between, tasks = page.evaluate("[window.frames_, window.tasks_]")
    context.close()
    ranks = statistics.quantiles(between, n=100)
    late = sum(time > LATE_MS for time in between) / len(between)
    how = "as it is" if slower == 1 else f"{slower:g} times slower"
    times = " | ".join(f"{ranks[rank - 1]:.1f}" for rank in (50, 95, 99))
    ends = f"{100 * late:.1f} % | {len(tasks)} | {max(tasks, default=0):.0f}"
    return f"| {view} | {how} | {len(between)} | {times} | {ends} |"


def first_paint(browser: Browser, url: str) -> str:
    """Files and bytes before the first message, and when the page has painted."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, base_url=url)
    page = context.new_page()
    page.goto("/ui")
    page.wait_for_load_state("networkidle")
    weight = page.evaluate(WEIGHT)
    context.close()
    sizes = f"{weight['bytes'] / 1e3:.0f} kB, {weight['sent'] / 1e3:.0f} kB as sent"
    return f"{weight['files']} files, {sizes}; first paint after {weight['paint']:.0f} ms"


def reopened(browser: Browser, url: str, tokens: int) -> str:
    """How long a conversation of so many tokens takes to show, by view."""
    context, page = opened(browser, url, tokens, 1)
    written(page, "Tell me everything.")
    page.reload()
    page.get_by_role("button", name="Look inside", exact=True).wait_for()
    chat = page.evaluate("performance.now()")
    inside = page.evaluate(OPEN_INSIDE)
    context.close()
    return (
        f"{tokens} tokens: Chat shown {chat:.0f} ms after a reload, "
        f"Inside {inside:.0f} ms after a click"
    )


def measure(browser: Browser, options: argparse.Namespace) -> None:
    """Print what was measured."""
    pace = f"{options.tokens} tokens at {options.tokens_per_s:g} tokens/s"
    print(f"{processor()}; Chromium {browser.version}; {pace}\n")
    print("| view | main thread | frames | p50 | p95 | p99 | late | long tasks | longest |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with paced(options.tokens_per_s) as url:
        for slower in options.slower:
            for view in ("Chat", "Inside"):
                print(frames(browser, url, view, options.tokens, slower))
        print("\n" + first_paint(browser, url))
    with paced(4000) as url:
        print(reopened(browser, url, options.long))


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens-per-s", type=float, default=200)
    parser.add_argument("--tokens", type=int, default=600, help="of the answer")
    parser.add_argument("--slower", type=float, nargs="*", default=[1, 4])
    parser.add_argument("--long", type=int, default=4000, help="tokens of what is opened again")
    options = parser.parse_args()
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        parser.error(f"none of {', '.join(BROWSERS)} is installed")
    with sync_playwright() as drivers:
        browser = drivers.chromium.launch(executable_path=path, args=["--no-sandbox"])
        measure(browser, options)
        browser.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
