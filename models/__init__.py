"""Networks and how they rest on disk. Imports nothing else of the project, and no web framework."""
