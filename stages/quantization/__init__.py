"""Matrices whose numbers are stored in few bits, and how checkpoints store them."""
