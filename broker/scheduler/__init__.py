"""What only the scheduler process runs. `process.py` is its shell; the rest decides."""
