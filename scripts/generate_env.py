"""Write deploy/env.example anew: every setting, those that matter on a server first.

`make docs` runs it; a test fails while the file says something else.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from transformers_api.config.described import described

FILE = Path(__file__).parent.parent / "deploy" / "env.example"

HEAD = """\
# The settings of the server: NAME=value, a line each, without quotes. install.sh puts this file at
# /etc/transformers-api/env; `systemctl restart transformers-api` makes a change take effect.
"""
# What a server behind nginx should have, and why.
CHOSEN = {
    "ALLOW_DOWNLOAD": (
        "false",
        "With a key any model could be fetched: use transformers-api pull.",
    ),
    "API_KEYS_FILE": ("/etc/transformers-api/api-keys", "Read again when it changes."),
    "TRUSTED_PROXIES": ("1", "nginx, which says who the client is."),
}
# The unit passes this one as a file, so that it is in no process's environment.
LEFT_OUT = {"HF_TOKEN"}


def text() -> str:
    """The whole file."""
    rows = {name: (default, help_) for name, default, _, help_ in described()}
    blocks = [HEAD]
    for name, (value, why) in CHOSEN.items():
        blocks.append(f"{_comment(f'{rows[name][1]} {why}')}\n{name}={value}\n")
    for name, (default, help_) in rows.items():
        if name not in CHOSEN and name not in LEFT_OUT:
            blocks.append(f"{_comment(help_)}\n#{name}={_portable(default)}\n")
    return "\n".join(blocks)


def main() -> None:
    """Bring the file up to date."""
    FILE.write_text(text())


def _comment(help_: str) -> str:
    return "\n".join(f"# {line}" for line in textwrap.wrap(help_, 96))


def _portable(default: str) -> str:
    """Not the home folder of whoever runs this."""
    return default.replace(str(Path.home()), "~")


if __name__ == "__main__":
    main()
