"""`gqa-serve simulate`: the engine's own scheduler and prefix cache in virtual time."""
