"""Quantised matrices of a checkpoint as numbers, or as ggml's blocks that say the very same.

Start reading at ``tensor.py``. Each layout is that of the library that writes it; what is where,
the headers of checkpoints know. Rows are made when they are asked for, a few at a time.
"""
