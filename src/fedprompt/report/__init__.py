"""What a run looks like: figures, tables, the page, and the live display. Imports `runs`."""
