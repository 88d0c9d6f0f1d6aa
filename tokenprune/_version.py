"""The version of this distribution, once."""

__version__ = "0.1.0"
