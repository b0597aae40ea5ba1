"""Benchmarks and experiments, run from the root of the repository. Nothing here is installed."""
