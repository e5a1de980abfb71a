"""Tables that others published, one strict reader a format; docs/foreign-tables.md has the schemas."""
