"""What is not an option of a command or script, and which one was meant."""

import difflib
import re


def refuse_unknown(parser, unknown):
    """End with exit status 2 at arguments that a command or script does not have."""
    known = re.findall(r"--[a-z0-9_-]+", parser.format_help())
    word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
