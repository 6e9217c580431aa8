"""The HTTP side: OpenAI-compatible routes over an `AsyncEngine`."""
