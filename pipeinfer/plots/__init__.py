"""Pictures of traces and results. The only package that needs matplotlib, which is an extra."""
