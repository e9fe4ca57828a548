"""Running Python that nobody has read: what a program can reach is decided by the kernel, its verdict elsewhere."""
