"""The voice: replicas that generate (torch) and the router that asks them (no torch)."""
