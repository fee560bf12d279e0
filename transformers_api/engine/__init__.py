"""Token ids in, token ids out: torch and transformers. Never text, never HTTP.

Start reading at ``batching.py``: ``BatchingEngine.step`` is the heart of the program.
"""
