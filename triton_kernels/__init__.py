"""Triton kernels, one module per operator; each imports triton, so `pyext.ops` imports them on first use only."""
