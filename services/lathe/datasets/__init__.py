"""Immutable uploaded files, their validation, and the token objects that are made from them."""
