"""Weights that do not all fit into memory: which are resident, which are read for each pass, and reading them ahead."""
