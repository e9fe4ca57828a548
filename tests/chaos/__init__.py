"""The kill matrix: a stack of real processes is hurt in every way while it writes, and its answers are judged."""
