"""Benchmarks: one suite measured in reality, emulated over MPI, or simulated, and rows that say which it was."""
