"""The door: OpenAI's HTTP surface over the store and the replicas. Loads no torch."""
