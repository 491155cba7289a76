"""The command line: one module a command, with `register` for its options and `run`, which imports what it needs.

Results go to stdout, progress to stderr; nothing is overwritten without --force.
"""
