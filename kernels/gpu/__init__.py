"""Triton kernels, one file each, for NVIDIA and AMD.

Not in kernels/ itself, where the oracles and the noise are: what lies here needs Triton, and one line of configuration
says so. Not called `triton` either: inside such a package a reader never knows which one is meant.
"""
