"""A recorded forward pass as a program: planned, fused, tiled and executed in one native call.

Start reading at ``planner.py`` (memory and shapes for any number of tokens), then ``executor.py``.
"""
