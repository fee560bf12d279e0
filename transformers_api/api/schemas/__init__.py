"""Marshmallow schemas: validation and OpenAPI from one source."""
