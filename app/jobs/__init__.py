"""Long work: rows that survive, the processes that do it, and what owns them."""
