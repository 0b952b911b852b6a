"""Live models: from a name to an answer. Imports nothing of HTTP."""
