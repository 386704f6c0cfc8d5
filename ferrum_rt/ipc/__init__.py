"""The wire between the daemon and its clients: messages, framing, and the client. Needs no torch."""
