"""One step: what happens in it, in which order, and what is kept for it."""
