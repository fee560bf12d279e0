"""What every route shares: bodies, authentication, errors, streams, the life of one request.

No route stands here. Start reading at ``request_context.py`` (what a request holds and how it
ends), then ``body.py`` (validation) and ``stream_writer.py`` (one thread writes all streams).
"""
