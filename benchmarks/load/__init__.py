"""The load generator behind ``python -m benchmarks.load``; it knows nothing of the service."""
