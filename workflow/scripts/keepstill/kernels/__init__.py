"""Numba kernels: floats and arrays in, arrays out; each has a slow twin in ``tests/naive.py``.

Volumes are indexed ``[z, y, x]``: NIfTI stores x fastest, so this is the file's own order and
x is the contiguous axis that the inner loops walk. Voxel positions are (x, y, z). No kernel
uses fast-math or fused multiply-add, and every sum has a fixed order, so that a result
depends neither on the instruction set nor on how work is shared out.
"""
