"""How costs grow with sizes: rows of sizes, exponents with intervals, one table, one figure."""
