"""Commands of the command line that have much to say; the others are in `autocompress.cli`."""
