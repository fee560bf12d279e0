"""CPU kernels in C++ and what runs them; the ground floor, which knows no engine.

Start reading at ``abi.py`` (what the compiled library offers). ``provider.py`` and ``build.py``
find or compile it, ``capture.py`` and ``graph/`` turn a forward pass into one call of ``src/``.
"""
