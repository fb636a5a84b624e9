"""What a step costs: ours and other optimizers against torch's fused AdamW, timed in turn in one run."""
