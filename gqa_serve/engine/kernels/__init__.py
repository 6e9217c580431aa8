"""Kernels that are not plain torch, one package for each kind of device."""
