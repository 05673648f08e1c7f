"""Training: one jitted step over a named mesh, checkpoints, and the loop around them."""
