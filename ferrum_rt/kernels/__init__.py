"""Tensors in, tensors out: no request and no scheduler is known here."""
