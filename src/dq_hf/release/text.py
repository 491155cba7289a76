"""Small files of plain values from untrusted sources: read with bounded time and memory, and quoted only in part."""

import json
import os
import reprlib

import yaml

# A configuration of the release has 4 KB and 7 levels of nesting.
MOST_BYTES = 100_000
MOST_NESTING = 30
MOST_CHARACTERS = 200  # of a value or name in a message


def read_text(path, kind):
    """The text of a small file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no {kind} {path}")
    with open(path, "rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    return content.decode("utf-8")


def read_yaml(path):
    """What a YAML file of plain values holds."""
    try:
        return yaml.load(read_text(path, "configuration"), Loader=PlainLoader)
    except (yaml.YAMLError, ValueError, LookupError) as error:  # LookupError: an empty number
        raise ValueError(f"{path} is not a YAML file of plain values: {cut(error)}") from None


class PlainLoader(yaml.SafeLoader):
    """Refuses aliases, which can stand for any number of values, and deep nesting, before it builds anything."""

    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or self.depth == MOST_NESTING:
            problem = f"more than {MOST_NESTING} levels of nesting" if self.depth == MOST_NESTING else "an alias"
            raise ValueError(
                f"line {event.start_mark.line + 1} has {problem}; write the values out, as the release does"
            )
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_json(path, kind):
    """What a JSON file holds."""
    try:
        return json.loads(read_text(path, kind))
    except RecursionError:
        raise ValueError(f"the {kind} {path} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"the {kind} {path} is not a JSON file: {cut(error)}") from None


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


def listed(names, limit=8):
    """The first few names, each cut, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(cut, names[:limit])) + more


BEGINNING = reprlib.Repr()
BEGINNING.maxlevel = 2
BEGINNING.maxdict = BEGINNING.maxlist = BEGINNING.maxset = 8
BEGINNING.maxstring = BEGINNING.maxother = BEGINNING.maxlong = MOST_CHARACTERS
