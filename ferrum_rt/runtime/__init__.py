"""The tasks and what they own: from a request to its stream of chunks."""
