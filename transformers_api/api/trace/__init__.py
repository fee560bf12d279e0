"""Traces in streams: the field ``trace`` of a body, and the JSON of what was noted of a token.

Start reading at ``schema.py`` (what may be asked for), then ``format.py`` (what comes back).
"""
