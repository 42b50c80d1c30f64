"""Several real hosts, a real Redis, kills in random order, and clients that count every byte."""
