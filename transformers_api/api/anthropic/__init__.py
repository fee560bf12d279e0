"""Anthropic's /v1/messages: the API that Claude Code speaks.

Begin with ``views.py``; ``input.py`` makes a conversation of a body, ``format.py`` writes the
answer.
"""
