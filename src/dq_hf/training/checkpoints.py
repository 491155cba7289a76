"""Checkpoints of a training run: `checkpoint-<step>` folders that are either whole or not there."""

import shutil
from pathlib import Path

PREFIX = "checkpoint-"


def save_checkpoint(accelerator, run_dir, step, keep=2):
    """Save the accelerator's state after `step` steps, and delete all but the newest `keep` (1 or more) checkpoints.

    All machines must see `run_dir`.
    """
    if keep < 1:
        raise ValueError(f"keep must be 1 or more, got {keep}")
    final = Path(run_dir) / f"{PREFIX}{step}"
    partial = Path(run_dir) / f"partial-{PREFIX}{step}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in list_checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume(accelerator, run_dir):
    """Load the newest checkpoint of a run and return its step; 0 if there is none."""
    checkpoints = list_checkpoints(run_dir)
    if not checkpoints:
        return 0
    accelerator.load_state(str(checkpoints[-1]))
    return checkpoint_step(checkpoints[-1])


def list_checkpoints(run_dir):
    """Checkpoint folders of a run, oldest first; others, like copies that a user renamed, do not count."""
    folders = [path for path in Path(run_dir).glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(folder):
    """Steps done when the checkpoint was saved."""
    return int(folder.name.removeprefix(PREFIX))
