"""Headers of files, read without torch and without trust: lists of models show them.

Start reading at ``gguf_file.py`` or ``safetensors_file.py``; ``pickled_file.py`` reads a
checkpoint's outline without running it, and ``originals.py`` recognises the families of the
original systems in it.
"""
