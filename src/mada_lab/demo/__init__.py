"""The demonstration: AdamW and OMADA side by side, from a badly guessed learning rate."""
