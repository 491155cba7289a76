"""Writing files so that they are whole or not there."""

from contextlib import contextmanager


@contextmanager
def whole_file(path):
    """A path to write to, which becomes `path` at the end; after an error what was there before is still there."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
