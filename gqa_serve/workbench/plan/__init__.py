"""`gqa-serve plan`: what a model needs and can reach on a device, for every number of KV heads."""
