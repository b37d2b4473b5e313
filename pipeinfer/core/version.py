"""The version of pipeinfer."""

__version__ = "0.1.0"
