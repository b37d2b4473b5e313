"""Model folders: what they say and which tensors they hold."""
