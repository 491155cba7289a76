"""Checkpoints of a training run: `checkpoint-<step>` folders, written atomically."""

import logging
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

from accelerate import PartialState
from accelerate.utils import RNG_STATE_NAME, broadcast_object_list, gather_object, load
from safetensors import SafetensorError

from ..hub.folders import partial_of, put_in_place, recover

PREFIX = "checkpoint-"
logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint, or another file of a run, that cannot be written or read; says how to go on."""


def save_checkpoint(accelerator, run_dir, step, keep=2):
    """Save the accelerator's state after `step` steps, then delete all but the newest `keep` (1 or more) checkpoints.

    Killed at any moment, also by a power cut, it leaves the old checkpoints, the new one, or both. All processes call
    it, and all machines must see `run_dir`.

    Raises:
        CheckpointError: on every process, if one cannot write; the old checkpoints are still there.
        ValueError: gradients are being accumulated, which no checkpoint holds.
    """
    if not accelerator.sync_gradients:
        raise ValueError("gradients are being accumulated; save after an optimizer step (accelerator.sync_gradients)")
    run_dir = Path(run_dir)
    final = run_dir / f"{PREFIX}{step}"
    partial = partial_of(final)

    def prepare():
        tidy(run_dir)
        partial.mkdir(parents=True)

    def publish():
        put_in_place(final)
        for old in list_checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old.rename(run_dir / f"partial-{old.name}"))

    try:
        by_main_process(prepare)
        together(lambda: accelerator.save_state(str(partial)))
        by_main_process(publish)
    except CheckpointError as error:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(cannot_write(final, run_dir, error)) from error


def resume(accelerator, run_dir, choice="auto"):
    """Load the checkpoint that `find_checkpoint` finds and return its step; 0 for a run that starts.

    Raises:
        CheckpointError: on every process: the choice is impossible, or the checkpoint does not fit or is damaged.
    """
    folder = find_checkpoint(run_dir, choice)
    if folder is None:
        return 0
    try:
        together(lambda: load_checkpoint(accelerator, folder))
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} cannot be loaded: {error}. If settings changed, give those that it was saved with, or another "
            "output folder; if it is damaged, delete it, to go on from the one before"
        ) from error
    return checkpoint_step(folder)


def find_checkpoint(run_dir, choice="auto"):
    """Folder of the checkpoint that a run goes on from, None for a run that starts. All processes call it.

    Args:
        choice: "auto", the newest checkpoint in `run_dir` if there is one; "never", start, in a folder without
            checkpoints; or the path of a checkpoint, than which `run_dir` must hold no newer one.

    Raises:
        CheckpointError: on every process: the choice is impossible.
    """
    chosen = by_main_process(lambda: choose_checkpoint(Path(run_dir), choice))
    return broadcast_object_list([chosen])[0]


def choose_checkpoint(run_dir, choice):
    """Folder of the checkpoint to load, None to start; see `find_checkpoint`."""
    tidy(run_dir)
    checkpoints = list_checkpoints(run_dir)
    newest = checkpoints[-1] if checkpoints else None
    if choice == "auto":
        return newest
    if choice == "never":
        if newest is not None:
            raise CheckpointError(
                f"expected no checkpoint in {run_dir}, got {newest.name}; resume with 'auto' to go on from it, or give "
                "another folder"
            )
        return None
    folder = Path(choice)
    if not (is_checkpoint(folder) and folder.is_dir()):
        raise CheckpointError(
            f"expected 'auto', 'never' or a folder named {PREFIX}<step> to resume from, got {choice}"
        )
    if newest is not None and checkpoint_step(newest) >= checkpoint_step(folder) and not newest.samefile(folder):
        raise CheckpointError(
            f"expected no checkpoint in {run_dir} that {folder} is not newer than, got {newest.name}; move those away, or "
            "give another folder, or resume with 'auto' to go on from the newest"
        )
    return folder


def load_checkpoint(accelerator, folder):
    """Load all that `save_checkpoint` saved; an error if anything is missing."""
    processes = len(list(folder.glob(f"{RNG_STATE_NAME}_*.pkl")))
    if processes != accelerator.num_processes:
        raise ValueError(
            f"expected random states of {accelerator.num_processes} processes, got {processes}; launch as many processes "
            "as saved it, on machines that share the folder"
        )
    # load_state says nothing if this one is damaged.
    load(folder / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl")
    accelerator.load_state(str(folder))


def list_checkpoints(run_dir):
    """Checkpoint folders of a run, oldest first; others, like copies that a user renamed, do not count."""
    run_dir = Path(run_dir)
    entries = run_dir.iterdir() if run_dir.is_dir() else ()  # glob would take what it may not read for empty
    return sorted(filter(is_checkpoint, entries), key=checkpoint_step)


def is_checkpoint(folder):
    """Whether a folder has a checkpoint's name."""
    return folder.name.startswith(PREFIX) and folder.name.removeprefix(PREFIX).isdecimal()


def checkpoint_step(folder):
    """Steps done when the checkpoint was saved."""
    return int(folder.name.removeprefix(PREFIX))


def check_writable(run_dir):
    """Make the folder of a run, and prove that files can be written there.

    Raises:
        CheckpointError: read-only, full, not a folder, or not permitted.
    """
    with writing(run_dir, run_dir):
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=run_dir) as file:
            file.write(b"\0")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def writing(path, run_dir):
    """Where `path` is written: what Python, torch and safetensors raise then becomes a `CheckpointError`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(cannot_write(path, run_dir, in_one_line(error))) from error


def cannot_write(path, run_dir, reason):
    """What to tell when a file of a run cannot be written."""
    try:
        space = f"{shutil.disk_usage(run_dir).free / 1e6:,.0f} MB are free"
    except OSError:
        space = "no such folder yet"
    return (
        f"{path} could not be written: {reason}. {last_good(run_dir)} Make sure that {run_dir} is a folder that can be "
        f"written and has space ({space}), then give the same command again"
    )


def last_good(run_dir):
    """A sentence that names the newest checkpoint."""
    try:
        checkpoints = list_checkpoints(run_dir)
    except OSError as error:
        return f"The checkpoints there cannot be listed: {in_one_line(error)}."
    return f"The last good checkpoint is {checkpoints[-1]}." if checkpoints else "There is no checkpoint yet."


def together(action):
    """What `action` gives on this process; if it fails on any process, it fails on all.

    Raises:
        CheckpointError: with the reasons.
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:  # whatever it is: the other processes would wait for this one for ever
        failure = error
        if PartialState().num_processes > 1:  # at once: sharded training would wait for the others' part of the save
            logger.error("process %d: %s", PartialState().process_index, in_one_line(error))
    reasons = gather_object([] if failure is None else [in_one_line(failure)])
    if reasons:
        raise CheckpointError("; ".join(dict.fromkeys(reasons))) from failure
    return result


def by_main_process(action):
    """What `action` gives on the main process, and None on the others, which wait for it, and fail as in `together`."""
    return together(lambda: action() if PartialState().is_main_process else None)


def in_one_line(error):
    """An error, in words."""
    if isinstance(error, CheckpointError):
        return str(error)
    return shorten(f"{type(error).__name__}: {error}", 500)


def tidy(run_dir):
    """Undo what an earlier crash left half done."""
    recover(run_dir)
    for partial in run_dir.glob(f"partial-{PREFIX}*"):
        shutil.rmtree(partial)
