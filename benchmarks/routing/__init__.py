"""Routing quality in virtual time: the policies and the prefix index as shipped, in front of engine models."""
