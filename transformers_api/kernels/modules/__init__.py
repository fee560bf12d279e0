"""Modules that stand in for torch's: linear layers and attention on packed weights.

Start reading at ``replace.py``, which puts them into a model.
"""
