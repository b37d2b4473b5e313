"""Model folders: configuration and tensors."""
