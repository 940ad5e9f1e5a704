"""One module for each backend: its slots and its evaluator class. Adding a backend adds one file."""
