"""Where experts are: from disk into host memory under a byte budget."""
