"""How commands and scripts refuse: in one line, and with the option that was probably meant."""

import difflib
import re
import sys
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def errors_in_one_line(program, *more):
    """End with exit status 1 and one line on stderr at an expected error, or one of further classes; at Ctrl-C, too."""
    if hasattr(sys.stdout, "reconfigure"):  # names of any signs, whatever the terminal takes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except (OSError, ValueError, TypeError, ImportError, *more) as error:
        tqdm.write(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)  # below progress bars
        sys.exit(1)
    except KeyboardInterrupt:
        tqdm.write(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)  # as shells have it


def refuse_unknown(parser, unknown):
    """End with exit status 2 at arguments that a command or script does not have."""
    known = re.findall(r"--[a-z0-9_-]+", parser.format_help())
    word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
