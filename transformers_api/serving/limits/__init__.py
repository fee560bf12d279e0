"""Limits of what may be asked: places in the queue, rates, API keys, cancellation.

Start reading at ``admission.py`` (places and deadlines), then ``token_bucket.py`` (rates) and
``access.py``.
"""
