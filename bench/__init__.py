"""One script per question, each run as ``python -m bench.NAME``; the last line of standard output is one JSON object."""
