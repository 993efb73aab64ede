"""Training data and prompts: read, streamed, encoded once, and kept in caches."""
