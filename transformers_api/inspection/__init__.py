"""Looking inside a model: while it writes (``trace.py``) and at given tokens (``inspector.py``).

Wraps the engine's runner and sampler, or visits the model between two steps; the engine does not
know this package. Start reading at ``base.py``.
"""
