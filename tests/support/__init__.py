"""What several tests share: hand-made views, processes, a client, waiting with a deadline."""
