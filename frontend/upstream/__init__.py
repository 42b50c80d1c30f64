"""How bytes reach an instance."""
