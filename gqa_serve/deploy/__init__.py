"""Deploying the server by other means than `gqa-serve`: on a Ray cluster (`ray_app.py`, docs/scaling.md)."""
