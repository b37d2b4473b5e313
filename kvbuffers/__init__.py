"""Multibuffered key/value slots: the table every shard keeps, and the allocator of whoever hands slots out."""
