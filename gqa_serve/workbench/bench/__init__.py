"""Measuring: a server over HTTP, the engine in process, its kernels alone."""
