"""HTTP in, HTTP out: Flask and marshmallow. Never torch, never transformers.

Start reading at ``openai/views.py``; what all routes share is in ``http/``.
"""

from __future__ import annotations

from flask import Flask

from transformers_api.api.anthropic.views import blueprint as messages
from transformers_api.api.http import auth, errors, middleware
from transformers_api.api.http.services import EXTENSION, Services
from transformers_api.api.http.strict_json import StrictJSONProvider
from transformers_api.api.inspect.calibration import blueprint as calibration
from transformers_api.api.inspect.grids import blueprint as grids
from transformers_api.api.inspect.jobs import blueprint as jobs
from transformers_api.api.inspect.lenses import blueprint as lenses
from transformers_api.api.inspect.logit_parts import blueprint as logit_parts
from transformers_api.api.inspect.model import blueprint as inspected_model
from transformers_api.api.inspect.runs import blueprint as runs
from transformers_api.api.inspect.saes import blueprint as saes
from transformers_api.api.inspect.stability import blueprint as stability
from transformers_api.api.inspect.vectors import blueprint as vectors
from transformers_api.api.inspect.views import blueprint as inspect
from transformers_api.api.llamacpp.views import blueprint as llamacpp
from transformers_api.api.ollama.views import blueprint as ollama
from transformers_api.api.openai.embeddings import blueprint as embeddings
from transformers_api.api.openai.models import blueprint as models
from transformers_api.api.openai.rerank import blueprint as rerank
from transformers_api.api.openai.tokens import blueprint as tokens
from transformers_api.api.openai.views import blueprint as openai
from transformers_api.api.ops import docs
from transformers_api.api.ops.health import blueprint as health
from transformers_api.api.ops.monitoring import blueprint as monitoring
from transformers_api.api.responses.views import blueprint as responses
from transformers_api.api.seeds.chat_stream import blueprint as chat_stream
from transformers_api.api.seeds.generate import blueprint as generate
from transformers_api.api.web.views import blueprint as page

__all__ = ["Services", "register"]


def register(app: Flask, services: Services) -> None:
    """Give ``app`` every route, error handler and hook; the views work with ``services``."""
    app.extensions[EXTENSION] = services
    assert services.private_paths  # made now, not when an error is to be told
    app.json = StrictJSONProvider(app)
    app.url_map.strict_slashes = False
    middleware.install(app, services.settings)
    auth.install(app, services)
    errors.install(app)
    api = docs.install(app, needs_key=services.access.keys is not None)
    openai_routes = (openai, responses, messages, embeddings, rerank, models, tokens)
    inspection = (inspected_model, inspect, logit_parts, grids, jobs, vectors, runs, stability)
    stored = (lenses, saes, calibration)
    others = (chat_stream, *inspection, *stored, health, monitoring)
    for blueprint in (*openai_routes, ollama, llamacpp, generate, *others):
        api.register_blueprint(blueprint)
    app.register_blueprint(page)
