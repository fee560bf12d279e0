"""Serve Hugging Face causal language models over HTTP.

Layers, one direction: ``api`` (HTTP) -> ``serving`` (text, models) -> ``engine`` (token ids, torch)
-> ``kernels``. ``app.py`` wires them together: start there. Importing this package loads nothing
heavy.
"""

__version__ = "0.1.0"
