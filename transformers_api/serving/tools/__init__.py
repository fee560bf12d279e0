"""Tools that a model may call: how calls are written and read, what the model is told of them.

Begin with ``answer_plan.py``, which decides for one request; ``call_format.py`` says what a format
is.
"""
