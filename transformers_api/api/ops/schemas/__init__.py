"""Answers of the operators' routes.

Start reading at ``status.py``: everything that ``GET /status`` tells.
"""
