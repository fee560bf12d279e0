"""The health check of a container, as a program: it fails where the process does not answer.

``/readyz`` says whether the model is there too.
"""

from __future__ import annotations

import http.client

from transformers_api.config.settings import Settings

WAIT_S = 4.0


def is_healthy(port: int) -> bool:
    """True where the server on this port of the loopback answers ``/healthz`` with 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    raise SystemExit(not is_healthy(Settings.from_env().port))
