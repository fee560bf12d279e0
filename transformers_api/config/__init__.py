"""The settings: one reader of the environment, and how text becomes values.

``settings.py`` declares every setting once; the command line, the documentation and
``deploy/env.example`` are made from it. Start there; ``parsers.py`` turns text into values.
"""
