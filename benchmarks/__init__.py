"""Benchmarks of deepops against stock PyTorch; run them with ``make bench`` or ``python -m benchmarks.run --help``."""
