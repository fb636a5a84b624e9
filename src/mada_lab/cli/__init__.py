"""The command ``mada``."""
