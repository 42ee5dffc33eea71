"""Command-line helpers of the project, run as modules: `python -m scripts.demo`."""
