"""The serving side of inspections: what may be traced, whose turn it is, recent completions.

Start reading at ``trace_plan.py`` (a trace's fields checked against the model), then ``queue.py``
(one inspection at a time, between decode steps).
"""
