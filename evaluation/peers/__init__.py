"""What others offer for the same work, measured beside the served stack in one run."""
