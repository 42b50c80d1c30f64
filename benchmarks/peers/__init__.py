"""Whole-system comparison with other routers on one machine: `make bench-peers`; read docs/performance.md first."""
