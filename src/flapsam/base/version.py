"""The version of flapsam."""

__version__ = "0.1.0"
