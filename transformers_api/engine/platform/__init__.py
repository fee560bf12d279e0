"""What torch and the operating system need: a lean import, shapes without weights, memory.

Start reading at ``lazy_torch.py``; ``memory.py`` counts and gives back what was freed.
"""
