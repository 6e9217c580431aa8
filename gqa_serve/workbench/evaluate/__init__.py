"""`gqa-serve eval`: what a checkpoint, a KV cache format or a quantization costs and saves."""
