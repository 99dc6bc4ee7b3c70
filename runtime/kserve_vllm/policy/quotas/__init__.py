"""Limits of rates, tokens and concurrency, counted in memory or in Redis."""
