"""Interventions: the field ``intervene`` of a body, and what an answer says of them.

Start reading at ``schema.py`` (what may be asked for), then ``format.py`` (what comes back).
"""
