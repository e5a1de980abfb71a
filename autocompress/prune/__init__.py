"""A user's own network made narrower: what its channels depend on, which matter, and their removal."""
