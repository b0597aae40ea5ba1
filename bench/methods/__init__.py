"""Every method at one budget on the synthetic dataset: ``python -m bench.methods``."""
