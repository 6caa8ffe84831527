"""THE MATERIAL: files, formats, rendering. Knows tokenizers and templates; no torch, no SQL, no HTTP."""
