"""The engine as a daemon on a Unix socket."""
