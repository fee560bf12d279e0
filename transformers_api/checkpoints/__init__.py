"""Other files to a folder in the transformers format: GGUF, and the original systems' checkpoints.

Start reading at ``convert.py``, a program of its own; ``formats.py`` knows the layouts, ``read.py``
reads pickles without running them, ``tokenizers.py`` makes the tokenizer. For GGUF
that is ``gguf_tokenizer.py``, its patterns lie in ``pretokenizers.py``; ``headers/`` reads headers.
"""
