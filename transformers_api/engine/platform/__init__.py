"""Torch and the operating system: a lazy import, shapes without weights, memory, cores.

Start reading at ``lazy_torch.py``; ``memory.py`` counts and gives back what was freed.
"""
