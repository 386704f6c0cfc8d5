"""Which sequences compute what next, and whose pages hold it: no tensor, no task, no clock of its own."""
