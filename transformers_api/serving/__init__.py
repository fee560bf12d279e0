"""Use cases: text and models. Never Flask, never torch.

Start reading at ``generation.py``, then ``swapper.py``.
"""
