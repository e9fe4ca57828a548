"""When an answer is right: one verifier for each kind of task."""
