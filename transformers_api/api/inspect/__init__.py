"""``/inspect/*``: questions about what a model does inside, answered as JSON, files or a page.

Start reading at ``views.py``; ``subjects.py`` says which tokens are asked about and ``format.py``
makes answers. ``pages/`` holds the attention page.
"""
