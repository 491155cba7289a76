"""A process that serves the demo's page and is watched: whom it asks for anything, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
from PIL import Image

WATCHED = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts the tests may have it ignored
def watch(event, args):
    host = {{"socket.connect": lambda: args[1][0], "socket.getaddrinfo": lambda: args[0]}}.get(event, lambda: None)()
    if isinstance(host, str) and host and not host.startswith(("127.", "::1", "localhost", "0.0.0.0")):
        print("ASKED", host, flush=True)
sys.addaudithook(watch)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(code, folder, **environment):
    """(process, what it has printed, port) once the page is there; `{port}` in the code is filled in."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", (WATCHED + code).format(port=port)],
        cwd=folder,
        env={**os.environ, "GRADIO_TEMP_DIR": str(folder / "uploads"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("http://"):
            return process, lines, port
    raise AssertionError("".join(lines))


def stop(process, lines):
    """End it as Ctrl-C does; it must have asked nobody and lost nothing on the way."""
    process.send_signal(signal.SIGINT)
    text = "".join(lines) + process.communicate(timeout=120)[0]
    exceptions = re.findall(r"^Traceback .*\n(?: .*\n)*(.*)", text, re.MULTILINE)
    left = {"starlette.requests.ClientDisconnect"}  # a visitor, while gradio received a file
    assert "ASKED" not in text and left.issuperset(exceptions), text


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)


def enlarged(image, scale):
    return pixels(image).repeat(scale, 0).repeat(scale, 1)


def table(markdown):
    """Rows of a Markdown table as dictionaries."""
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines())
    return [dict(zip(head, row)) for row in rows]


def psnr(first, second):
    """dB of tensors in [-1, 1]."""
    return 10 * np.log10(4 / np.mean((first.double() - second.double()).numpy() ** 2))


def opened(result):
    """The picture of a result of gradio's client."""
    return Image.open(result["path"])
