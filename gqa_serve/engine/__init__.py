"""The engine: scheduler, KV cache, model and sampler. It knows nothing of HTTP."""
