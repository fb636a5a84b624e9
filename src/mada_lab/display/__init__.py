"""What a terminal shows while runs are trained."""
