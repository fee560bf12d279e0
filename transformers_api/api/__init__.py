"""HTTP in, HTTP out: Flask and marshmallow. Never torch, never transformers.

Start reading at ``openai.py``.
"""
