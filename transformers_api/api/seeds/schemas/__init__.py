"""Bodies and answers of the routes in ``api/seeds``.

``generate.py`` belongs to the native API, ``chat_stream.py`` to niels-gpt's chat. Start at either.
"""
