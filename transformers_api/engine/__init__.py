"""Token ids in, token ids out: torch and transformers. Never text, never HTTP.

``base.py`` is the protocol that the rest of the program knows. Start reading at ``llm_engine.py``:
``BatchingEngine.step`` is the heart of the program; ``loader.py`` makes an engine of a folder.
"""
