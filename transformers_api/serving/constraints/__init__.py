"""Constraints on what a model may write: grammars, compiled for a tokenizer.

Begin with ``compiler.py``; ``json_schema.py`` bounds what clients send before it gets there.
"""
