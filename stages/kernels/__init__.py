"""Computations that every shard shares: finite numbers, best tokens, sampling."""
