"""One file for each family of trace formats; each turns blocks of a file into columns."""
