"""Routes for operators: health, status, metrics, the OpenAPI document and its two pages.

Start reading at ``health.py``. ``static/`` holds the vendored files of the documentation pages.
"""
