"""What users call: the optimizers, their parameter groups and their checkpoints."""
