"""Models that another server answers for: one that speaks OpenAI's API, named by the registry.

Start at ``engine.py``; ``chunks.py`` reads what comes, ``connection.py`` knows HTTP.
"""
