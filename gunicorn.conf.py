"""What ``gunicorn wsgi:app`` and ``gunicorn app:app`` read: the server's own options."""

from transformers_api.server import standard_streams
from transformers_api.server.serve import options, settings_or_exit

standard_streams.open_missing()
globals().update(options(settings_or_exit()))
