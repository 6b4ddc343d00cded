"""Kernels: a folder each, with the plain reference that it is tested against."""
