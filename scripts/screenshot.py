"""Take the picture of the README from a running server, with chromium: docs/images/attention.png.

python -m scripts.screenshot --url http://127.0.0.1:5000
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "attention.png"
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
QUESTION = {
    "prompt": "The cat sat on the mat because it was warm.",
    "trace_layer": 12,
    "head": 3,
}


def main() -> int:
    """Ask for the page, and photograph it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:5000")
    parser.add_argument("--size", default="800,620", help="of the window, in pixels")
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error(f"none of {', '.join(BROWSERS)} is installed")
    request = urllib.request.Request(
        f"{options.url}/inspect/full_attn",
        json.dumps(QUESTION).encode(),
        {"Accept": "text/html", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        page = answer.read()
    PICTURE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "attention.html"
        path.write_bytes(page)
        command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars"]
        command += [f"--window-size={options.size}", f"--user-data-dir={folder}/profile"]
        command += ["--virtual-time-budget=5000", f"--screenshot={PICTURE}", path.as_uri()]
        subprocess.run(command, check=True, timeout=60, capture_output=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
