"""What the benchmarks share: options, clocks, the device's name, tables, and sections of a Markdown file."""

import platform
import time
from dataclasses import field
from pathlib import Path

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def option(default, text):
    """A field of a benchmark's arguments, with its help."""
    chosen = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": text}, **chosen)


def synchronize(device):
    """Wait until a GPU has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def describe_device(device, threads):
    """The device's name, and for a CPU the number of threads."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {threads} thread(s)"


def cpu_name():
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(rows, texts=()):
    """Markdown of rows {heading: cell}; columns are those of numbers, but for the headings `texts`, or None: all."""
    if not rows:
        return ""
    marks = "|".join("---" if texts is None or heading in texts else "---:" for heading in rows[0])
    heads, *lines = (f"| {' | '.join(map(str, line))} |" for line in (rows[0], *(row.values() for row in rows)))
    return "\n".join([heads, f"|{marks}|", *lines])


def publish(report, title, path):
    """Print a report, and put it into a Markdown file (None: nowhere), see `write_section`."""
    print(report)
    if path is not None:
        write_section(Path(path), title, report)


def write_section(path, title, report):
    """Put a report between the two marks of its title; they are added at the end of the file, or to a new one."""
    begin, end = (f"<!-- {edge} of {title} -->" for edge in ("begin", "end"))
    text = path.read_text() if path.exists() else ""
    if begin not in text:
        text = f"{text.rstrip()}\n\n{begin}\n{end}\n".lstrip()
    before, rest = text.split(begin)
    path.write_text(f"{before}{begin}\n{report}\n{end}{rest.split(end)[1]}")
