"""Align language models and compare the methods honestly: recipe -> training -> evaluation -> report."""

__version__ = "0.1.0"
