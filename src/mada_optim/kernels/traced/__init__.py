"""The passes traced, cut in three, and compiled by torch.compile."""
