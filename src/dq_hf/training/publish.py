"""The model card of a training run, and the upload of its model."""

import platform
import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from huggingface_hub import constants

from .. import __version__
from ..hub.upload import check_push, upload

PACKAGES = ("torch", "transformers", "diffusers", "accelerate", "datasets", "huggingface_hub")


def versions():
    """Installed versions of what trains."""
    found = {"dq_hf": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # the user's environment has it without its metadata, or not at all
            continue
    return ", ".join(f"{name} {number}" for name, number in found.items())


def machine_facts(accelerator):
    """Processes, precision, device and software of a run, for the table `training` of its card."""
    precision = {"no": "float32", "bf16": "bfloat16, mixed", "fp16": "float16, mixed"}
    device = (
        torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else accelerator.device
    )
    return {
        "processes": accelerator.num_processes,
        "precision": precision.get(accelerator.mixed_precision, accelerator.mixed_precision),
        "device of a process": str(device),
        "software": versions(),
    }


def command_line():
    """The command of this process, quoted for a shell, without tokens of the Hub and passwords in addresses.

    `accelerate launch` starts the script with `python` and keeps its own options to itself; `machine_facts` says what
    they did.
    """
    program, *arguments = sys.argv
    words = program.split() if program.startswith("dq-hf ") else ["python", program]
    words += [re.sub(r"hf_\w{8,}|(?<=://)[^/@]+(?=@)", "HIDDEN", word) for word in arguments]
    return shlex.join(words)


def push_folder(folder, repo_id, private=None, commit_message="Upload the trained model"):
    """Upload a finished model folder as it is, its card included, and return the address of the repository.

    Arguments and errors as for `check_push`. The folder stays as it is, and an `OSError` says how to upload it by hand.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; save the model there first")
    command = ["hf", "upload", repo_id, str(folder), ".", *(["--private"] if private else [])]
    by_hand = f"\n{folder} is whole; upload it later with `{shlex.join(command)}`"
    try:
        repo_id = check_push(repo_id, private)
        upload(folder, repo_id, commit_message, keep_card=False)
    except OSError as error:
        raise type(error)(f"{error}{by_hand}") from error
    return f"{constants.ENDPOINT}/{repo_id}"
