"""Start processes, watch them, start them again."""
