"""Work in several processes and on several machines, by Ray; nothing of Ray is imported before it is used."""
