"""Where questions come from: the lab's generated tasks, benchmarks and files of people's own."""
