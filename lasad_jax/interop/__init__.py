"""Files of other programs: reading and writing them."""
