"""Lathe: the open fine-tuning platform that you run yourself."""

__version__ = "0.1.0"
