"""Many runs on equal terms: an experiment, its stages, the pool in which they are trained."""
