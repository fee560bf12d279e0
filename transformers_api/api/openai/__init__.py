"""OpenAI's API: chat and text completions, embeddings, models, tokens.

Start reading at ``views.py``; ``requests.py`` makes plain data of a body and ``format.py`` makes
JSON of results. ``schemas/`` validates bodies and is the OpenAPI document too.
"""
