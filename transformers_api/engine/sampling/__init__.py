"""Logits to tokens: the definition, and the fast path that gives the same tokens.

Start reading at ``sampler.py``; ``fast_sampler.py`` answers where there is no doubt, ``rng.py``
makes a token a function of (seed, step, id).
"""
