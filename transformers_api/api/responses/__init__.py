"""OpenAI's /v1/responses: the API that Codex and the Agents SDK speak.

Begin with ``views.py``; ``input.py`` makes a conversation of a body, ``format.py`` writes the
answer.
"""
