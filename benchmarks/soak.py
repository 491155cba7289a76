"""Whether a process that lives long stays as it was: memory, open files and temporary files over thousands of calls.

    pip install -c constraints.txt -e ".[demo]"
    python benchmarks/soak.py --output docs/performance.md     # an hour of one CPU core

Encodes, samples and requests to the served web demo (a sample, an upload that is painted over and drawn again, and values that are refused, in turn; each by a new visitor) run in one process, one after the other. Exit status 1 if memory or files grow in the second half.
"""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

TEMPORARY = tempfile.mkdtemp()
tempfile.tempdir = os.environ["TMPDIR"] = TEMPORARY
SHOWN = os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(dir=Path(TEMPORARY).parent)  # kept for an hour, by design
for folder in (TEMPORARY, SHOWN):
    atexit.register(shutil.rmtree, folder)

import httpx  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from report import describe_device, option, publish, table  # noqa: E402
from transformers import HfArgumentParser  # noqa: E402

from dq_hf import DEFAULT_MODEL  # noqa: E402
from dq_hf.demo.components import PROMPTS  # noqa: E402
from dq_hf.demo.page import launch, make_page  # noqa: E402
from dq_hf.loading import load_models  # noqa: E402

MOST_GROWTH = 0.05  # of the memory, from the middle to the end
POINTS = 10  # measurements of each kind of call


@dataclass
class Arguments:
    model: str = option(DEFAULT_MODEL, "folder or repository of both models")
    encodes: int = option(2000, "images to encode and decode")
    samples: int = option(1000, "images to sample")
    requests: int = option(1000, "requests to the demo")
    threads: int = option(1, "CPU threads")
    output: str | None = option(None, "Markdown file to put the table into")


def main(args):
    torch.set_num_threads(args.threads)
    vae, pipe = load_models(args.model)
    pipe.set_progress_bar_config(disable=True)
    calls = {
        "encodes": lambda i: encode(vae, i),
        "samples": lambda i: sample(pipe, i),
        "demo requests": Visitor(vae, pipe).request,
    }
    numbers = dict(zip(calls, (args.encodes, args.samples, args.requests)))
    at_first = temporary_files()  # libraries leave some when they are imported
    tables = {name: soak(name, call, numbers[name]) for name, call in calls.items()}
    left = [str(path.relative_to(TEMPORARY)) for path in sorted(temporary_files() - at_first)]
    report = make_report(tables, left, args)
    publish(report, "benchmarks/soak.py", args.output)
    return left or any(has_grown(points) for points in tables.values())


def soak(name, call, number):
    """Call (i) so many times; gives `POINTS` measurements."""
    points = []
    for i in range(number):
        call(i)
        if (i + 1) % max(number // POINTS, 1) == 0:
            points.append({"calls": i + 1, **measure()})
            print(f"{name}: {points[-1]}", file=sys.stderr, flush=True)
    return points


def measure():
    """Memory in MB, descriptors and threads of this process, and files in the temporary folder."""
    gc.collect()
    process = psutil.Process()
    return {
        "megabytes": process.memory_info().rss / 2**20,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "temporary_files": len(temporary_files()),
    }


def temporary_files():
    """The files in the temporary folder."""
    return {path for path in Path(TEMPORARY).rglob("*") if path.is_file()}


def has_grown(points):
    """Whether memory or descriptors grew from the middle to the end."""
    middle, end = points[(len(points) - 1) // 2], points[-1]
    more_memory = end["megabytes"] > middle["megabytes"] * (1 + MOST_GROWTH)
    return more_memory or end["descriptors"] > middle["descriptors"]


@torch.no_grad()
def encode(vae, i):
    """Encode and decode one image of noise."""
    height, width = vae.config.image_height_width
    pixel_values = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(i)) * 2 - 1
    vae.decode_codes(vae.encode(pixel_values).codes)


def sample(pipe, i):
    """Sample one image, of each class or prompt in turn."""
    pipe(generator=torch.Generator().manual_seed(i), **condition(pipe, i))


def condition(pipe, i):
    """What the i-th image is of, by the names of the pipeline's arguments."""
    config = pipe.transformer.config
    labels = {"class_labels": [i % config.num_classes]} if config.num_classes else {}
    return labels if config.text_length is None else labels | {"prompt": PROMPTS[i % len(PROMPTS)]}


class Visitor:
    """Asks the demo, served here, by the requests that a browser sends."""

    def __init__(self, vae, pipe):
        page = make_page(vae, pipe)
        self.address = launch(page) + "gradio_api/"
        self.inputs = {block.api_name: block.inputs for block in page.fns.values()}
        self.image = Path(SHOWN, "noise.png")
        Image.effect_noise((64, 64), 50).convert("RGB").save(self.image)

    def request(self, i):
        """The i-th request."""
        if i % 3 == 0:
            expect("event: complete", self.ask("sample", {"Seed": i, "Prompt": PROMPTS[0]}))
        elif i % 3 == 1:
            files = {"files": ("noise.png", self.image.read_bytes())}
            (path,) = httpx.post(self.address + "upload", files=files, timeout=600).json()
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            painting = {"background": None, "layers": [file], "composite": None}
            expect("event: complete", self.ask("open_to_edit", {"Image": file}, f"visitor {i}"))
            edit = {"Paint here": painting, "Seed": i, "Prompt": PROMPTS[0], "Candidates": 1}
            expect("event: complete", self.ask("edit", edit, f"visitor {i}"))
        else:
            expect("Seed must be one number", self.ask("sample", {"Seed": "seven"}))

    def ask(self, endpoint, sent, session=None):
        """What an endpoint answers.

        Args:
            endpoint: its name.
            sent: values by their components' labels; what the page begins with for all others.
            session: name of a visitor who has been here; None: a new one.
        """
        components = [component for component in self.inputs[endpoint] if not component.stateful]
        values = [sent.get(component.label, component.value) for component in components]
        body = {"data": values, "session_hash": session}
        event = httpx.post(f"{self.address}call/{endpoint}", json=body, timeout=600).json()["event_id"]
        return httpx.get(f"{self.address}call/{endpoint}/{event}", timeout=600).text


def expect(words, answer):
    """Raise RuntimeError unless the words are in the answer."""
    if words not in answer:
        raise RuntimeError(f"the demo should say {words!r}, got {answer[-500:]}")


def make_report(tables, left, args):
    """Markdown."""
    rows = []
    for name, points in tables.items():
        middle, end = points[(len(points) - 1) // 2], points[-1]
        rows.append(
            {
                "": name,
                "calls": f"{end['calls']:,}",
                "memory in the middle, MB": f"{middle['megabytes']:.0f}",
                "at the end, MB": f"{end['megabytes']:.0f}",
                "descriptors in the middle": middle["descriptors"],
                "at the end": end["descriptors"],
            }
        )
    return (
        f"{describe_device('cpu', args.threads)}; torch {torch.__version__}; {Path(args.model).name}; one process.\n\n"
        f"{table(rows, texts=[''])}\n\nLeft in the temporary folder: {', '.join(left) or 'nothing'}."
    )


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    sys.exit(1 if main(arguments) else 0)
