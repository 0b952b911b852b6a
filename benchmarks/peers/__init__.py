"""Other systems that serve PyTorch models, each installed in an environment of its own."""
