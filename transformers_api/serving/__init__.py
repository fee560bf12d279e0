"""Use cases: text and models. Never Flask, never torch.

Start reading at ``generation.py``, the one way text is generated; then ``swap/`` (one resident
model), ``text/``, ``models/``, ``limits/`` and ``inspect/``.
"""
