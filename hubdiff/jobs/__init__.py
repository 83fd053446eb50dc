"""The jobs hubdiff does, one module each: what the command line runs and what ``import hubdiff``
offers. A job opens its models, works, publishes once, and returns a value that describes itself as
JSON (``as_json``)."""
