"""Base models that operators register, and the adapters that jobs produce."""
