"""What requests and answers look like: the source of validation and of the OpenAPI document."""
