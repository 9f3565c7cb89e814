"""Kernels in C for the CPU: the library that is compiled at first use, and the calls of it."""
