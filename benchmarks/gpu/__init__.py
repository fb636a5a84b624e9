"""What ``benchmarks/gpu_check.py`` is made of: a file for each stage, and what the stages share."""
