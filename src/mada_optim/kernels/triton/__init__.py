"""The passes written in Triton, for all parameters at once."""
