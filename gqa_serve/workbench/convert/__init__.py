"""`gqa-serve convert`: the same model with another number of KV heads."""
