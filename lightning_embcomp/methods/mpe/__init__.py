"""MPE: bits of rows, searched for and trained at."""
