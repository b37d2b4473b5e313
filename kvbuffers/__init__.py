"""Multibuffered key/value cells: the table every shard keeps, and the ledger of whoever hands cells out."""
