"""CPU kernels in C++ and what runs them; the ground floor, which knows no engine.

Start reading at ``abi.py`` (the functions and structures of the compiled library). ``provider.py``
and ``build.py`` find or compile it, ``capture.py`` and ``graph/`` turn a forward pass into one call
of ``src/``, where ``abi.h`` is the place to begin.
"""
