"""Where raw logs come from: real ones fetched from the packages that carry them, and a synthetic one."""
