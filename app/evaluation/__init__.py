"""Evaluation through the serving path."""
