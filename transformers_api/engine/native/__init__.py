"""Kernels of our own for CPUs, in one C++ file. Start at library.py."""
