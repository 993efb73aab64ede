"""The evidence: which images are compared, how they are scored, and what is shown."""
