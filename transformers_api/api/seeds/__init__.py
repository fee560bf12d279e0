"""The APIs of the systems that this server keeps the promises of: ``docs/seeds.md``.

``generate.py`` is TinyGPT's and simple_llm_host's native API, ``chat_stream.py`` is niels-gpt's
chat with attention traces. Start reading at ``generate.py``.
"""
