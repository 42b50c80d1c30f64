"""The HTTP face of Penstock: what one frontend process runs."""
