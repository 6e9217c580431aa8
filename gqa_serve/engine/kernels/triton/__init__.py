"""Kernels for CUDA GPUs, in Triton: one noun per file, each with a plain-torch twin of the same signature.

The twin is the kernel's documentation and its oracle. Launchers take tensors where they lie, wait for nothing
and choose tile sizes by shapes and dtypes alone, so that a launch can be captured in a CUDA graph and a row's
result does not depend on what else is in the batch. Nothing is imported here: the package works without it.
"""
