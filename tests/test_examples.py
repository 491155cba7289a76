"""The training scripts as a user runs them: what they leave behind, and that a stopped run goes on as if never stopped."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

from dq_hf import DQImageProcessor, DQPipeline, DQTransformerForImageGeneration, DQVAEModel

EXAMPLES = Path(__file__).parents[1] / "examples"
VAE_SIZES = "--image_size 16 --granularities 4 2 --block_out_channels 8 8 16 --norm_num_groups 4 --z_channels 8"
VAE_SIZES += " --codebook_size 16 --codebook_dim 8 --warmup_steps 2 --batch_size 5"
# Four batches an epoch: step 3 is inside the first epoch, step 6 inside the second.
SCHEDULE = "--max_steps 6 --save_every 3 --sample_every 3"


def make_image(source, name):
    """Noise, on a plain ground or under one."""
    image = np.full((16, 16, 3), 255, dtype=np.uint8)
    half = slice(0, 8) if name == "moon" else slice(8, 16)
    image[half] = source.integers(0, 256, (8, 16, 3))
    return Image.fromarray(image)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with `folders`, images in class folders, and `tables`, the same images as files of a data set."""
    place = tmp_path_factory.mktemp("examples")
    source = np.random.default_rng(0)
    for split, count in (("train", 11), ("test", 3)):
        for name in ("moon", "sun"):
            folder = place / "folders" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                make_image(source, name).save(folder / f"{i}.png")
    (place / "tables").mkdir()
    for split in ("train", "test"):
        paths = sorted((place / "folders" / split).rglob("*.png"))
        rows = {"image": [str(path) for path in paths], "label": [int(path.parent.name == "sun") for path in paths]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["moon", "sun"])})
        images = datasets.Dataset.from_dict(rows, features).map(lambda row: row)
        images.to_parquet(place / "tables" / f"{split}-00000-of-00001.parquet")
    return place


def run(place, script, arguments, launch=()):
    """Run an example from `place`, and give the finished process."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HOME": str(place / "hf")}
    command = [sys.executable, *launch, str(EXAMPLES / script), *arguments.split()]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)


def run_well(place, script, arguments, launch=()):
    done = run(place, script, arguments, launch)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def copy_stopped_run(output_dir, new_dir):
    """What is on the disk when a run is stopped between step 3 and step 6."""
    shutil.copytree(output_dir / "checkpoint-3", new_dir / "checkpoint-3")


def assert_same_weights(path, other):
    weights, others = load_file(path), load_file(other)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)


@pytest.fixture(scope="module")
def vae_arguments():
    return f"--data folders --router feature --perceptual_weight 0.2 {VAE_SIZES} {SCHEDULE}"


@pytest.fixture(scope="module")
def vae_run(place, vae_arguments):
    """A run with a feature router and the perceptual loss, by `accelerate launch`."""
    launch = ("-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1")
    run_well(place, "train_dqvae.py", f"--output_dir vae {vae_arguments}", launch)
    return place / "vae"


@pytest.fixture(scope="module")
def entropy_vae_run(place):
    """A run with the entropy router, without the perceptual loss, on Parquet files."""
    arguments = f"--output_dir entropy --data tables --perceptual_weight 0 --fine_ratios 0.5 {VAE_SIZES}"
    run_well(place, "train_dqvae.py", f"{arguments} --max_steps 2 --save_every 2 --sample_every 2")
    return place / "entropy"


@pytest.fixture(scope="module")
def transformer_arguments():
    sizes = "--hidden_size 16 --num_attention_heads 2 --num_position_layers 1 --num_content_layers 1 --warmup_steps 2"
    return f"--vae entropy/model --data folders --batch_size 10 {sizes} {SCHEDULE}"


@pytest.fixture(scope="module")
def transformer_run(place, entropy_vae_run, transformer_arguments):
    run_well(place, "train_dqtransformer.py", f"--output_dir transformer {transformer_arguments}")
    return place / "transformer"


def test_stage_1_leaves_a_tokenizer_that_loads(vae_run):
    model, processor = (
        DQVAEModel.from_pretrained(vae_run / "model"),
        DQImageProcessor.from_pretrained(vae_run / "model"),
    )
    assert model.config.router == "feature" and model.config.granularities == [4, 2]
    assert processor.size == {"height": 16, "width": 16}
    codes = model.encode(processor(make_image(np.random.default_rng(0), "sun"))["pixel_values"]).codes
    assert codes.shape == (1, 8, 8)
    assert sorted(path.name for path in vae_run.iterdir()) == [
        "checkpoint-3",
        "checkpoint-6",
        "model",
        "samples-000003.png",
        "samples-000006.png",
    ]
    assert Image.open(vae_run / "samples-000006.png").size == (5 * 64, 3 * 64)  # inputs, codings, reconstructions


def test_a_stopped_stage_1_goes_on_as_if_never_stopped(place, vae_run, vae_arguments):
    copy_stopped_run(vae_run, place / "vae-resumed")
    done = run_well(place, "train_dqvae.py", f"--output_dir vae-resumed {vae_arguments}")
    assert "starting at step 3" in done.stdout
    assert_same_weights(place / "vae-resumed" / "model" / "model.safetensors", vae_run / "model" / "model.safetensors")


def test_stage_1_calibrates_the_entropy_router(entropy_vae_run, place):
    model = DQVAEModel.from_pretrained(entropy_vae_run / "model")
    images = [Image.open(path) for path in (place / "folders" / "train").rglob("*.png")]
    grain_map = model.encode(DQImageProcessor(size={"height": 16, "width": 16})(images)["pixel_values"]).grain_map
    assert grain_map.float().mean().item() == pytest.approx(0.5, abs=0.01)  # half of each image is plain


def test_stage_2_leaves_a_folder_for_every_door(transformer_run):
    task = pipeline("dq-generation", model=str(transformer_run / "model"))
    assert task.model.config.id2label == {0: "moon", 1: "sun"}
    result = task("sun", seed=1)
    assert result["image"].size == (16, 16) and result["label"] == "sun"
    pipe = DQPipeline.from_pretrained(transformer_run / "model")
    output = pipe(class_labels="sun", generator=torch.Generator().manual_seed(1))
    assert torch.equal(output.codes[0], result["codes"])
    names = {path.name for path in transformer_run.iterdir()}
    assert names == {"checkpoint-3", "checkpoint-6", "model", "samples-000003.png", "samples-000006.png"}
    assert Image.open(transformer_run / "samples-000006.png").size == (8 * 16, 2 * 16)


def test_stage_2_does_not_change_the_tokenizer(transformer_run, entropy_vae_run):
    joint = transformer_run / "model" / "vae" / "model.safetensors"
    assert_same_weights(joint, entropy_vae_run / "model" / "model.safetensors")


def test_a_stopped_stage_2_goes_on_as_if_never_stopped(place, transformer_run, transformer_arguments):
    copy_stopped_run(transformer_run, place / "transformer-resumed")
    done = run_well(place, "train_dqtransformer.py", f"--output_dir transformer-resumed {transformer_arguments}")
    assert "starting at step 3" in done.stdout
    weights = Path("checkpoint-6") / "model.safetensors"
    assert_same_weights(place / "transformer-resumed" / weights, transformer_run / weights)


def test_stage_2_keeps_the_model_with_the_smallest_held_out_loss(transformer_run):
    saved = DQTransformerForImageGeneration.from_pretrained(transformer_run / "model" / "transformer").state_dict()
    checkpoints = [load_file(transformer_run / f"checkpoint-{step}" / "model.safetensors") for step in (3, 6)]
    same = [all(torch.equal(saved[key], weights[key]) for key in saved) for weights in checkpoints]
    assert sum(same) == 1


def test_too_large_batches_are_refused(place):
    done = run(place, "train_dqvae.py", f"--output_dir small --data folders {VAE_SIZES} --batch_size 23")
    assert done.returncode != 0 and "must be at most 22, the number of training images" in done.stderr
