"""Threads of our own, and how late the event loop takes up what they have done."""
