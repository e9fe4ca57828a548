"""Jobs of the trainer: each one runs in a process of its own, ends exactly once, publishes at most one checkpoint."""
