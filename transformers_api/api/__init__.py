"""HTTP in, HTTP out: Flask and marshmallow. Never torch, never transformers.

Start reading at ``openai.py``.
"""

from __future__ import annotations

from flask import Flask

from transformers_api.api import docs, errors, hooks
from transformers_api.api.embeddings import blueprint as embeddings
from transformers_api.api.health import blueprint as health
from transformers_api.api.models import blueprint as models
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
    errors.install(app)
    api = docs.install(app)
    for blueprint in (openai, embeddings, models, tokens, native, health):
        api.register_blueprint(blueprint)
