"""Which rank has which role, and which layers each stage has."""
