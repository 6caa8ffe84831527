"""THE WORDS: what every other room says. Standard library and pydantic only; no torch, no SQL, no HTTP."""
