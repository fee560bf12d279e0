"""Which models may be served, where their files lie, and whether the files are whole.

Start reading at ``spec.py`` (a registry entry), then ``registry.py`` (all of them) and ``store.py``
(an entry becomes a folder that can be loaded, from a path, a package or ``hub.py``).
"""
