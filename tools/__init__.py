"""Commands for those who work on ferrum_rt."""
