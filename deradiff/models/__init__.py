"""Base models: their families, one file each, how they are found and loaded, and what they cost."""
