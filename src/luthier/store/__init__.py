"""THE MEMORY: files, jobs, models and keys, in SQL and in blobs. Knows no HTTP, no torch and no process."""
