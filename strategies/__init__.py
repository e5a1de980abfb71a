"""Search strategies that come with autocompress, one file each; third parties add theirs by entry point."""
