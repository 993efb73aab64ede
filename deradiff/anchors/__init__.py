"""Aligned models as files: what an anchor is, and the formats that it comes in."""
