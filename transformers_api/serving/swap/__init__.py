"""One resident model at a time: who waits, what is evicted, and who holds a lease.

Start reading at ``policy.py``, the decisions without threads or a clock; ``swapper.py`` carries
them out and ``residency.py`` is the thread that loads.
"""
