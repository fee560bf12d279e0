"""Ollama's API, for programs that speak nothing else: chat, generate, embed, what there is.

Begin with ``views.py``; ``chat.py`` makes a conversation of a body and writes the answer.
"""
