"""A batch of token ids to logits: plain torch, CUDA graphs, one sequence at a time; wrappers.

Start reading at ``model_runner.py``; ``verify.py`` compares a runner with the model's own logits
before it is used.
"""
