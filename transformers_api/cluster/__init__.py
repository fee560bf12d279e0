"""``ENGINE=ray``: fronts without torch, and replicas of the local engine over Ray Serve.

``replica.py`` is what runs beside a model, ``front.py`` what stands for it where requests come in;
``messages.py`` is all that passes between them. Ray itself is met in ``transport.py``,
``deployment.py`` and ``head.py`` alone.
"""
