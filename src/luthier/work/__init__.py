"""The hands: workers that claim jobs and start the engine as a process. Loads no torch."""
