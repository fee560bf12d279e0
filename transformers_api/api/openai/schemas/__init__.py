"""Bodies and answers of OpenAI's routes, validated and documented by the same classes.

Start reading at ``chat.py``; the sampling fields it shares with completions stand in
``http/sampling_schema.py``.
"""
