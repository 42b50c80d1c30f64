def send(descriptor: int, data: bytes, /) -> int:
    """Writes to a socket what it takes at once. Returns how many bytes that were; 0 also for every error."""
