"""Serve Hugging Face causal language models over HTTP.

Three layers, one direction: ``api`` (HTTP) -> ``serving`` (text, models) -> ``engine`` (token ids,
torch). ``app.py`` wires them together. Importing this package loads nothing heavy.
"""

__version__ = "0.1.0"
