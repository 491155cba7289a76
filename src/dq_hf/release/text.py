"""The release's configuration file, from an untrusted source: read with bounded time and memory, and quoted only in part."""

import os
import reprlib

from ..hub.folders import plain_yaml
from ..hub.weights import shorten

MOST_BYTES = 100_000  # a configuration of the release has 4 KB
MOST_CHARACTERS = 200  # of a value or name in a message


def read_yaml(path):
    """What a YAML file of plain values holds."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no configuration {path}")
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    try:
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        return plain_yaml(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a YAML file of plain values: {cut(error)}") from None


def cut(text, most=MOST_CHARACTERS):
    """`text`, or its beginning."""
    text = str(text)
    return text if len(text) <= most else f"{text[:most]} ..."


def shown(value):
    """`repr` of a plain value, or its beginning; a large value is not written out first."""
    try:
        return cut(BEGINNING.repr(value))
    except ValueError:  # Python refuses to write integers of thousands of digits
        return f"a long {type(value).__name__}"


def listed(names):
    """The first few names, each cut, and how many more there are."""
    return shorten([cut(name) for name in names])


BEGINNING = reprlib.Repr()
BEGINNING.maxlevel = 2
BEGINNING.maxdict = BEGINNING.maxlist = BEGINNING.maxset = 8
BEGINNING.maxstring = BEGINNING.maxother = BEGINNING.maxlong = MOST_CHARACTERS
