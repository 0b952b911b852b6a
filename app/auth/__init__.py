"""Keys: what they are, where they rest, and whose a request is."""
