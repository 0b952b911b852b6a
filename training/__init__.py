"""Changes weights and measures them, offline: no HTTP, no database, no environment variables."""
