"""Tensors: where they are, how they are spread over processes, cut into blocks, and rounded."""
