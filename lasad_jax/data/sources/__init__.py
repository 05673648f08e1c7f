"""Where images come from, one by one."""
