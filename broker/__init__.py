"""The routing vocabulary of Penstock and the processes around it."""
