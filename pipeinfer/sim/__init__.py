"""The simulator: the same machines as in a real run, in one process, under virtual time and a seeded network."""
