"""A simulated engine: a pure timing model under thin HTTP and ZMQ shells. It shares no decoder with the broker."""
