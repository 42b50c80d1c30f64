"""Skewed load over several hosts, in virtual time: `queue.py` and `stealing.py` as shipped, between engine models."""
