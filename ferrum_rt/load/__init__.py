"""Load tests: requests as many users would send them, what came of each, and pictures of it."""
