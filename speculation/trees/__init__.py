"""The token tree, what is accepted of it, and what its probabilities mean."""
