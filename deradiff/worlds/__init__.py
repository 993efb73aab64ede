"""Small worlds whose truth is known: the shapes world, and analytic beds."""
