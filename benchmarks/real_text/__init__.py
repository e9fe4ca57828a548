"""Does FusionRoute help on real text at small scale? `python -m benchmarks.real_text` trains, serves, asks, tells."""
