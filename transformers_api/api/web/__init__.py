"""The page: a browser's files, without a build step. Start in ``views.py``."""
