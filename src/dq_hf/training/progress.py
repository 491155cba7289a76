"""How far a training run is: its batches, a request to stop, non-finite losses, its log."""

import json
import math
import os
import signal
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path

import torch
from accelerate.utils import find_batch_size, gather_object
from tqdm.auto import tqdm

from ..data.streams import EndlessLoader
from ..hub.folders import whole_file
from .checkpoints import last_good, writing


@dataclass
class Progress:
    """How far a run is; to be given to `accelerator.register_for_checkpointing`."""

    step: int = 0  # optimizer steps done; counted by the training loop
    epoch: int = 0
    batch: int = 0  # batches of this epoch that were given out
    images: int = 0  # images given out in all epochs, by all processes

    def state_dict(self):
        return asdict(self)

    def load_state_dict(self, state):
        for name in vars(self):
            setattr(self, name, state[name])


def batches(loader, progress, accelerator, on_epoch=None, max_steps=math.inf):
    """Batches of one epoch after another, from where `progress` stands, which is kept up to date.

    Exact resuming asks that random augmentation is drawn in the training step, or from numbers made of epoch and
    image: batches are fetched one ahead.

    Args:
        loader: a prepared data loader, or an `EndlessLoader`.
        on_epoch: called with the epoch's number before its first batch is fetched.
        max_steps: the end, when the training loop has counted `progress.step` so far.

    Raises:
        ValueError: an epoch has no batch.
    """
    if progress.step >= max_steps:
        return
    if isinstance(loader, EndlessLoader):  # goes through epochs, and back to its place, by itself
        for batch in loader:
            progress.images += find_batch_size(batch) * accelerator.num_processes
            yield batch
            if progress.step >= max_steps:
                return
    while True:
        loader.set_epoch(progress.epoch)
        if on_epoch is not None:
            on_epoch(progress.epoch)
        rest = loader
        if progress.batch > 0:
            rest = accelerator.skip_first_batches(loader, progress.batch)
            rest.set_epoch(progress.epoch)  # accelerate 1.10 starts it at epoch 0
        iterator = iter(rest)
        with torch.random.fork_rng(devices=[]):  # opening draws a random number, and a resumed run opens once more
            opened = list(islice(iterator, 1))
        for batch in chain(opened, iterator):
            progress.batch += 1
            progress.images += find_batch_size(batch) * accelerator.num_processes
            yield batch
            if progress.step >= max_steps:
                return
        if progress.batch == 0:
            raise ValueError("an epoch has no batch: expected at least one; lower the batch size or add images")
        progress.epoch += 1
        progress.batch = 0


def check_max_steps(max_steps, step, run_dir):
    """Raise `ValueError` at a run that goes on after `step` and has no step left, unless its figures are in its folder."""
    run_dir = Path(run_dir)
    ended_here = (run_dir / f"checkpoint-{step}").is_dir() and (run_dir / "log.jsonl").exists()
    least = step if ended_here else step + 1
    if max_steps < least:
        raise ValueError(
            f"--max_steps must be at least {least} for {run_dir}, which goes on after step {step}, got {max_steps}"
        )


class StopSignal:
    """A request to stop, made by SIGTERM, for a training loop to ask for after each step."""

    def __init__(self):
        self.received = False
        self.group = None
        self.previous = signal.signal(signal.SIGTERM, self.receive)

    def receive(self, number, frame):
        self.received = True

    def ask(self, accelerator, *flags):
        """Whether any process was asked to stop, and of each flag whether it is true on any; the same list on all
        processes, which must all ask, as often.
        """
        flags = [self.received, *flags]
        if accelerator.num_processes == 1:
            return flags
        if self.group is None:
            self.group = torch.distributed.new_group(backend="gloo")  # on the CPU: a GPU would be waited for
        counts = torch.tensor(flags).int()
        torch.distributed.all_reduce(counts, group=self.group)
        return (counts > 0).tolist()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self.previous)


def ignore_sigterm(worker_id):
    """`worker_init_fn` of data loaders: workers live on while the run saves, when SIGTERM goes to all its processes."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def set_learning_rate(scheduler, learning_rate):
    """Let a resumed run go on with this highest rate; a checkpoint brings back the one that it was saved with."""
    scheduler.base_lrs = [learning_rate] * len(scheduler.base_lrs)
    for group, factor in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas):
        group["lr"] = learning_rate * factor(scheduler.last_epoch)


class NotFiniteError(RuntimeError):
    """A loss that is infinite or NaN; says how to go on."""


class FiniteCheck:
    """Remembers on the device, without waiting for it, which terms were ever infinite or NaN since `step`."""

    def __init__(self, step=0):
        self.step = step
        self.bad = {}

    def add(self, **terms):
        """Look at losses or gradient norms, tensors of any shape.

        Not at gradient norms under float16 gradient scaling, which skips steps whose gradients overflow.
        """
        for name, value in terms.items():
            bad = ~torch.isfinite(value.detach()).all()
            self.bad[name] = self.bad[name] | bad if name in self.bad else bad

    def raise_if_bad(self, step, run_dir):
        """Wait for the device; for steps at which all processes log or save.

        Raises:
            NotFiniteError: on every process, if a term of any was not finite.
        """
        names = sorted(set(gather_object([name for name, bad in self.bad.items() if bad])))
        if names:
            raise NotFiniteError(
                f"not finite between steps {self.step + 1} and {step}: {', '.join(names)}. {last_good(run_dir)} "
                "To go on from there: lower the learning rate, or use bf16 instead of fp16"
            )
        self.step = step


class RunLog:
    """Rows of numbers, as a file with one JSON object a line: {"step": 20, "loss": 0.5}. For one process only.

    Write the rows of a step before its checkpoint: a run that was killed then ends up with the log of one never killed.

    Args:
        step: go on after this step, and drop rows of later ones and a last line that is not whole.

    Raises:
        ValueError: a line that is not such a row.
        CheckpointError: the file cannot be written.
    """

    def __init__(self, path, step=None):
        self.path = Path(path)
        if step is None or not self.path.exists():
            return
        rows = [row for row in self.read() if row["step"] <= step]
        with writing(self.path, self.path.parent), whole_file(self.path) as partial:
            partial.write_text("".join(map(line_of, rows)))

    def write(self, step, values):
        """Add a row: the step, and a dictionary of numbers."""
        with writing(self.path, self.path.parent), open(self.path, "a") as file:
            file.write(line_of({"step": step, **values}))
            file.flush()
            os.fsync(file.fileno())

    def read(self):
        """The rows; a last line that is not whole does not count."""
        rows = []
        for number, line in enumerate(self.path.read_text().splitlines(keepends=True), 1):
            if line.endswith("\n"):
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{self.path}, line {number}: expected a JSON object, got {line!r}; repair or delete the file"
                    ) from error
        return rows


def line_of(row):
    return json.dumps(row) + "\n"


def progress_bar(total_steps, images_per_step, initial_step=0, disable=False):
    """A bar that shows images a second and the time left; to be given `update(images_per_step)` after each step."""
    return tqdm(
        total=total_steps * images_per_step,
        initial=initial_step * images_per_step,
        unit="img",
        unit_scale=True,
        disable=disable,
    )
