"""The settings: one reader of the environment, and how text becomes values.

``model_settings.py`` and ``server_settings.py`` declare every setting once; the command line, the
documentation and ``deploy/env.example`` are made from them. ``settings.py`` reads them all;
``parsers.py`` turns text into values.
"""
