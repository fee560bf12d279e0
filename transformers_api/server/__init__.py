"""The process: one gunicorn worker with many threads, its start, its end and its sockets.

Nothing here knows a route or a model. Start reading at ``serve.py`` (the options of gunicorn),
then ``worker.py`` and ``connections.py`` (requests are gathered before a thread is spent on them).
"""
