"""The loaders: each executes the order of sampler.py and the values of views.py."""
