"""The parts that all routes share: bodies, authentication, errors, streams, a request's life.

No route stands here. Start reading at ``request_context.py`` (the walk of a request, what it holds
and how it ends), then ``dialects.py`` (how an API answers), ``body.py`` (validation) and
``stream_writer.py`` (one thread writes all streams). A new API is a dialect, a blueprint that has
it, and for each generating route a ``Task`` and a ``Formatter``.
"""
