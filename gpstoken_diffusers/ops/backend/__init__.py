"""Finds, loads and diagnoses the native libraries, and compiles CUDA kernels where nvcc did not."""
