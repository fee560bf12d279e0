"""What ``gunicorn wsgi:app`` and ``gunicorn app:app`` read: the server's own options."""

from transformers_api.server.serve import options, settings_or_exit

globals().update(options(settings_or_exit()))
