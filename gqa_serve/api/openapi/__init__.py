"""/openapi.json and /docs: the API, described from its own types."""
