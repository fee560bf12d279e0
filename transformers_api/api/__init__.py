"""HTTP in, HTTP out: Flask and marshmallow. Never torch, never transformers.

Start reading at ``openai.py``.
"""

from __future__ import annotations

from flask import Flask

from transformers_api.api import access, docs, errors, hooks
from transformers_api.api.chat_stream import blueprint as chat_stream
from transformers_api.api.embeddings import blueprint as embeddings
from transformers_api.api.health import blueprint as health
from transformers_api.api.inspect import blueprint as inspect
from transformers_api.api.models import blueprint as models
from transformers_api.api.monitoring import blueprint as monitoring
from transformers_api.api.native import blueprint as native
from transformers_api.api.openai import blueprint as openai
from transformers_api.api.services import EXTENSION, Services
from transformers_api.api.strict_json import StrictJSONProvider
from transformers_api.api.tokens import blueprint as tokens

__all__ = ["Services", "register"]


def register(app: Flask, services: Services) -> None:
    """Give ``app`` every route, error handler and hook; the views work with ``services``."""
    app.extensions[EXTENSION] = services
    app.json = StrictJSONProvider(app)
    app.url_map.strict_slashes = False
    hooks.install(app, services.settings)
    access.install(app, services.settings)
    errors.install(app)
    api = docs.install(app, needs_key=services.access.keys is not None)
    openai_routes = (openai, embeddings, models, tokens)
    for blueprint in (*openai_routes, native, chat_stream, inspect, health, monitoring):
        api.register_blueprint(blueprint)
