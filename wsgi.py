"""``gunicorn wsgi:app``, with the settings of the environment."""

from transformers_api.app import create_app

app = create_app()
