"""How fast a replica answers, beside transformers."""
