"""What torch and the operating system need: a lazy import, shapes without weights, memory.

Start reading at ``lazy_torch.py``; ``memory.py`` counts and gives back what was freed.
"""
