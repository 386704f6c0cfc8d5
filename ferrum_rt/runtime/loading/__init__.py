"""From a directory to a model that can run."""
