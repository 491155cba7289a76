"""The command line: one module a command, with `register` for its options and `run`, which imports what it needs.

What several commands share is in `options`, `sampling` (which samples, drawn how) and `images` (which images are read).
Results go to stdout, progress to stderr; nothing is overwritten without --force.
"""
