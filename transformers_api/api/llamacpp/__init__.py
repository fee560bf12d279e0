"""llama-server's own routes, which editors use: /infill, /props, /apply-template.

Begin with ``views.py``; ``infill.py`` makes a completion of a body and writes the answer.
"""
