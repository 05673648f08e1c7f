"""Speed, measured by hand: each module prints a table of ours against a peer in the same run."""
