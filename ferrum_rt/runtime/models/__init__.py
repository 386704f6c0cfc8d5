"""Decoder models: families as data, one forward for all."""
