"""Files that others wrote: one boundary, one JSON reader, one check of names, and patterns that cannot hang."""
