"""The end of a run: what was found beside what one would have picked by hand."""
