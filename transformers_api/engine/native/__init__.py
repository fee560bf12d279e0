"""The engine's backend on the kernels of ``transformers_api.kernels``.

Start reading at ``convert_model.py`` (a model's layers become the kernels'), then ``runner.py``
(passes recorded once, then run) and ``verified.py`` (never believed unasked).
"""
