"""Target stages: the machine that passes runs on, and the shards that compute them."""
