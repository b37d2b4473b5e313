"""Multibuffered key/value slots: the table every shard keeps, and the ledger of whoever hands slots out."""
