"""THE WORK: torch lives here. Reads a run folder, writes a run folder. Importing this package loads no torch."""
