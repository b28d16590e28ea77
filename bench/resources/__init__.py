"""What compiled kernels need and issue, without a GPU: `python -m bench.resources` writes the report that CI compares.

CUDA sources are compiled by nvcc and Triton kernels by Triton, for GPUs that this machine lacks.
"""
