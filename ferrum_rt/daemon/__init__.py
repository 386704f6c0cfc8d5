"""The daemon: an engine behind a Unix socket, in a process of its own."""
