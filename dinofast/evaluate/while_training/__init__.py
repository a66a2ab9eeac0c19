"""Scores of the teacher while it trains."""
