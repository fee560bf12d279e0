"""Bodies of ``/inspect/*``, one class for each question.

Start reading at ``inspect.py``: ``Inspected`` has the fields that all questions share.
"""
