"""Model shards: the layers, with their keys and values."""
