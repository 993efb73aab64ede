"""The training loop and what surrounds it; `objectives` holds what can be trained."""
