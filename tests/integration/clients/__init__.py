"""Our APIs as applications use them: one stack for all of these."""
