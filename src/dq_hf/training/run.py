"""A training run around its step: processes, folder, checkpoints, log, progress, stop and end."""

import errno
import fcntl
import json
import logging
import os
import shutil
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    set_seed,
)
from torch.utils.data import DataLoader

from ..data.augmentation import Augmentation
from ..data.images import check_no_flip_column
from ..data.streams import load_train_and_test
from ..hub.card import write_model_card
from ..hub.folders import check_place, whole_folder
from ..hub.upload import check_push
from .checkpoints import (
    CheckpointError,
    by_main_process,
    check_writable,
    find_checkpoint,
    resume,
    save_checkpoint,
    writing,
)
from .options import REFUSED, check_data
from .progress import (
    FiniteCheck,
    Progress,
    RunLog,
    StopSignal,
    batches,
    check_max_steps,
    ignore_sigterm,
    progress_bar,
)
from .publish import command_line, machine_facts, push_folder

logger = logging.getLogger(__name__)
OPTIONS_FILE = "options.json"  # of a checkpoint: what a resumed run must not change, and what was measured on


class Run:
    """What a training script needs around its step; all processes make one and call its methods.

    In the order of their use: `load_images`, `train_loader`, `test_loaders`, `begins`, `resume`, then in the loop over `batches` first
    `watch`, and after a step `count_step`, `due`, `record`, `report`, `save_when_due`; last `end`.

    Args:
        options: `RunOptions`.
        name: of the run in trackers.
        handlers: of the `Accelerator`, keyword arguments for its parts.

    Attributes:
        accelerator, progress, options: as given and made.
        dir: the run's folder.
        held_out: what tells the images that count from others: where they come from, their split and number.
        measured_on: `held_out` of the last measurement, also of one before the run was resumed; None: there was none.
        stopped: whether the loop has ended because the run was asked to stop.

    Raises:
        CheckpointError: the folder cannot be written, another run uses it, or there is nothing to resume as asked.
    """

    def __init__(self, options, name, handlers=()):
        self.options = options
        self.name = name
        self.dir = Path(options.output_dir)
        self.accelerator = Accelerator(
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=options.gradient_accumulation_steps,
                sync_with_dataloader=False,  # steps of one size, also at the end of an epoch
            ),
            log_with=options.report_to,
            project_config=ProjectConfiguration(project_dir=options.output_dir, logging_dir=options.output_dir),
            step_scheduler_with_optimizer=False,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=options.seed),
            # One process checks the images, the others wait.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3)), *handlers],
        )
        if getattr(options, "codes", None) is None:
            check_data(options.data, options.output_dir)
        if options.report_to is not None and not self.accelerator.log_with:
            raise ValueError(f"--report_to {options.report_to} needs its package: pip install {options.report_to}")
        check_writable(self.dir)
        check_place(self.dir / "model")
        self.lock = by_main_process(lambda: lock(self.dir / ".lock", self.dir))
        self.begins = find_checkpoint(self.dir, options.resume) is None
        if options.push_to_hub and self.accelerator.is_main_process:
            options.push_to_hub = check_push(options.push_to_hub)  # with the user's name
        if options.train_split in options.test_split and self.accelerator.is_main_process:
            logger.warning(
                "--test_split has the training split %s: its figures are of images that the model learns, not held out",
                options.train_split,
            )
        set_seed(options.seed)
        self.progress = Progress()
        self.measured_on = None
        self.stopped = False

    @property
    def step(self):
        """Optimizer steps done."""
        return self.progress.step

    @property
    def images_per_step(self):
        """Images of a step, of all processes."""
        options = self.options
        return options.batch_size * options.gradient_accumulation_steps * self.accelerator.num_processes

    # Before the loop

    def load_images(self):
        """Images to train on, and {split: images to measure on}; see `load_train_and_test`."""
        options = self.options
        train_set, test_sets = load_train_and_test(
            self.accelerator,
            options.data,
            (options.train_split, *options.test_split),
            options.image_column,
            options.streaming,
            options.max_broken_share,
            options.max_test_images,
            options.seed,
        )
        if options.no_flip_column is not None:
            check_no_flip_column(train_set, options.no_flip_column)
        return train_set, dict(zip(options.test_split, test_sets))

    def augmentation(self):
        """What happens to training images."""
        options = self.options
        return Augmentation(
            options.seed, options.horizontal_flips, options.no_flip_column, random_crop=options.crop == "random"
        )

    def test_loaders(self, test_sets, collate):
        """{split: prepared batches to measure on}; how often they are read does not change what training draws."""
        first, images = next(iter(test_sets.items()))
        place = getattr(self.options, "codes", None) or self.options.data
        self.held_out = [os.path.abspath(place) if os.path.exists(place) else place, first, len(images)]
        settings = {"batch_size": self.options.batch_size, "collate_fn": collate}
        return {
            split: self.accelerator.prepare(DataLoader(images, **settings, generator=torch.Generator()))
            for split, images in test_sets.items()
        }

    def train_loader(self, dataset, collate, sampler=None):
        """Batches to train on, mixed unless a sampler or a stream does that; ValueError if there are too few rows for one."""
        batch_size = self.options.batch_size * self.accelerator.num_processes
        if not self.options.streaming and len(dataset) < batch_size:
            raise ValueError(
                f"a batch, of all processes, has {batch_size} images, but there are {len(dataset)} to train on; lower "
                "--batch_size or add images"
            )
        return DataLoader(
            dataset,
            self.options.batch_size,
            shuffle=sampler is None and not self.options.streaming,
            sampler=sampler,
            drop_last=True,
            collate_fn=collate,
            num_workers=self.options.num_workers,
            worker_init_fn=ignore_sigterm,
        )

    def resume(self, *parts, **facts):
        """Load the checkpoint to go on from, if there is one, into all that was prepared; then start log and trackers.

        Args:
            parts: what else is in a checkpoint, in their order; None: nothing.
            facts: what else must be as it was, besides the options `REFUSED`, or in place of one.

        Raises:
            CheckpointError: the checkpoint does not fit, or is damaged.
            ValueError: no step is left, unless it was made, and measured on these images, before.
        """
        accelerator, options = self.accelerator, self.options
        self.fixed = {name: value for name, value in vars(options).items() if name in REFUSED} | facts
        accelerator.register_for_checkpointing(self.progress, *(part for part in parts if part is not None))
        accelerator.register_save_state_pre_hook(self._save_fixed_options)
        accelerator.register_load_state_pre_hook(self._check_fixed_options)
        set_seed(options.seed, device_specific=True)
        resume(accelerator, self.dir, options.resume)
        check_max_steps(options.max_steps, self.step, self.dir)
        if self.step == options.max_steps and self.measured_on != self.held_out:
            data, split, number = self.held_out
            raise ValueError(
                f"no step is left, and nothing was measured on these {number} images of split {split!r} of {data}; give those "
                "that were measured on, or a larger --max_steps"
            )
        accelerator.init_trackers(self.name, config={name: str(value) for name, value in vars(options).items()})
        self.log = RunLog(self.dir / "log.jsonl", self.step) if accelerator.is_main_process else None
        self.finite = FiniteCheck(self.step)
        processes = "1 process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes"
        accelerator.print(f"{options.max_steps} steps by {processes}, starting at step {self.step}")

    def _save_fixed_options(self, models, weights, folder):
        if self.accelerator.is_main_process:
            facts = self.fixed | {"measured_on": self.measured_on}
            (Path(folder) / OPTIONS_FILE).write_text(json.dumps(facts, indent=1))

    def _check_fixed_options(self, models, folder):
        saved = json.loads((Path(folder) / OPTIONS_FILE).read_text())
        self.measured_on = saved["measured_on"]
        for name in saved.keys() & self.fixed.keys():
            if saved[name] != self.fixed[name]:
                raise ValueError(f"--{name} was {saved[name]}, got {self.fixed[name]}")

    # In the loop

    def batches(self, loader, on_epoch=None):
        """Batches, with a progress bar, to the last step or until SIGTERM asks to stop; see `progress.batches`."""
        accelerator, total = self.accelerator, self.options.max_steps
        bar = progress_bar(total, self.images_per_step, self.step, disable=not accelerator.is_main_process)
        self.saved_at = time.monotonic()
        with bar as self.bar, StopSignal() as self.stop:
            for batch in batches(loader, self.progress, accelerator, on_epoch, total):
                yield batch
                if self.stopped:
                    return

    def watch(self, terms, without_scaling=()):
        """Look at a pass's losses and norms by name, of which none may become infinite or NaN.

        Under fp16 a gradient may overflow, and its step is left out: norms, and what else is in `without_scaling`, are
        not looked at then.
        """
        scaled = self.accelerator.scaler is not None
        self.finite.add(**{name: terms[name] for name in terms if not (scaled and name in without_scaling)})

    def count_step(self):
        """An optimizer step was made."""
        self.progress.step += 1
        self.bar.set_description(f"step {self.step} of {self.options.max_steps}", refresh=False)
        self.bar.update(self.images_per_step)

    def due(self, every):
        """Whether this step is the n-th again, or the last.

        Raises:
            NotFiniteError: on every process, when something is due and a loss was not finite.
        """
        due = self.step % every == 0 or self.step == self.options.max_steps
        if due:
            self.finite.raise_if_bad(self.step, self.dir)
        return due

    def averaged(self, terms):
        """Terms as numbers by name, means over the processes."""
        values = self.accelerator.reduce(torch.stack([value.float() for value in terms.values()]), "mean")
        return dict(zip(terms, values.tolist()))

    def record(self, values, show=()):
        """Put numbers by name into log and tracker, and some beside the progress bar."""
        self.accelerator.log(values, self.step)
        if self.log is not None:
            self.log.write(self.step, values)
        if show:
            self.bar.set_postfix({name: f"{values[name]:.4g}" for name in show})

    def report(self, figures, **more):
        """Put held-out figures into log and tracker, and print them.

        Args:
            figures: {split: {name: number}}; those of the first split keep their names.
            more: further figures by name.
        """
        first, *others = figures
        values = figures[first] | {
            f"{name}/{split}": value for split in others for name, value in figures[split].items()
        }
        values |= more
        self.measured_on = self.held_out
        self.record(values)
        self.accelerator.print(f"step {self.step}: {json.dumps(values)}")

    def picture(self, step=None):
        """Path of a step's picture, of this one or another."""
        return self.dir / f"samples-{self.step if step is None else step:06d}.png"

    def save_when_due(self):
        """Save a checkpoint if one is due, or if the run was asked to stop, which then ends `batches`."""
        minutes = (time.monotonic() - self.saved_at) / 60
        self.stopped, late = self.stop.ask(self.accelerator, 0 < self.options.save_minutes <= minutes)
        if self.due(self.options.save_every) or late or self.stopped:
            self.finite.raise_if_bad(self.step, self.dir)
            save_checkpoint(self.accelerator, self.dir, self.step, self.options.keep_checkpoints)
            self.saved_at = time.monotonic()
        if self.stopped:
            self.accelerator.print(f"stopped at step {self.step}; the same command goes on from there")

    # After it

    def save_model(self, *parts):
        """Save models or processors as `model/`, from one process; what was there is lost only once that is done."""
        folder = self.dir / "model"
        with writing(folder, self.dir), whole_folder(folder) as partial:
            for part in parts:
                part.save_pretrained(partial)

    def publish(self, config, measured, metrics, losses, picture, dataset, data, training, sources=None):
        """From one process: put the card into `model/`, and push it if asked to.

        Args:
            config: of the model.
            measured: row of the log with the model's step and its held-out figures.
            metrics: names of those in the card.
            losses: names in the last row of training that go into the card.
            picture: name in `model/` for the picture of that step, if it is there.
            dataset: name of the images.
            data, training: more facts for the card's tables.
            sources: {name: model} that this one was made of.
        """
        options, folder = self.options, self.dir / "model"
        if self.picture(measured["step"]).exists():
            shutil.copy(self.picture(measured["step"]), folder / picture)
        trained = next(row for row in reversed(self.log.read()) if "loss" in row)
        write_model_card(
            folder,
            config,
            sources,
            title=options.push_to_hub or self.dir.name,
            repository=options.push_to_hub,
            dataset=dataset,
            test_split=options.test_split[0],
            held_out=options.test_split[0] != options.train_split,
            metrics={name: measured[name] for name in metrics if name in measured},
            losses={name: trained[name] for name in losses if name in trained},
            data=data,
            training={
                "steps": self.step,
                "images seen": self.progress.images,
                "batch, all processes": self.images_per_step,
                "learning rate, highest": options.learning_rate,
                "started from": options.start_from,
            }
            | training
            | machine_facts(self.accelerator),
            command=command_line(),
        )
        if options.push_to_hub:
            print(push_folder(folder, options.push_to_hub, commit_message=f"Train for {self.step} steps"))

    def end(self):
        """Wait for all processes, and end trackers and the hold on the folder."""
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.lock is not None:
            self.lock.close()


@contextmanager
def averaged_weights(model, average):
    """The moving average of the weights in place of the present ones.

    Args:
        average: `diffusers.training_utils.EMAModel` of the model's parameters; None: they stay.
    """
    if average is None:
        yield
        return
    average.store(model.parameters())
    average.copy_to(model.parameters())
    try:
        yield
    finally:
        average.restore(model.parameters())


def lock(path, folder):
    """An open file that only one process at a time can have; the system frees it when that process ends, however.

    Args:
        path: of the file.
        folder: that is to be used by one run at a time, for the message.

    Raises:
        CheckpointError: another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by processes that read images
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise CheckpointError(
                f"another run uses {folder}; wait for its end, or give another --output_dir"
            ) from error
        logger.warning("%s cannot be locked (%s): start no other run in this folder", folder, error)
    return file
