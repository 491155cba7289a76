"""`dq-hf evaluate`: its figures, its protocol, and one set of samples however it was made."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections import Counter

import datasets
import numpy as np
import psutil
import pytest
import torch
from conftest import TEXT, make_text_encoder, make_text_tokenizer, make_transformer, make_vae
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from slow_metrics import slow_frechet_distance

from dq_hf import DQForImageGeneration, DQImageProcessor, DQPipeline, DQVAEModel
from dq_hf.commands.main import main
from dq_hf.metrics.generation import evaluate_generation, label_cycle
from dq_hf.metrics.likelihood import evaluate_likelihood
from dq_hf.metrics.reconstruction import evaluate_reconstruction
from dq_hf.metrics.references import ReferenceImages, reference_labels, write_report
from dq_hf.networks.extractors import EfficientNetLite0Extractor
from dq_hf.networks.perceptual import EfficientNetLitePerceptualLoss

NAMES = {0: "sun", 1: "moon", 2: "star"}
PER_CLASS = {"moon": 2, "star": 5, "sun": 3}  # real images
THRESHOLD = 2.6  # nats, within the entropies of the images


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`model`, of both stages for 16x16 images, codes of 8x8 and 4x4 pixels and three classes, and `data`, ten images of 20x24 in class folders."""
    root = tmp_path_factory.mktemp("evaluation")
    vae = make_vae(granularities=[8, 4], block_out_channels=[8, 8, 8, 16], entropy_thresholds=[THRESHOLD])
    transformer = make_transformer(grid_sizes=[[2, 2], [4, 4]], num_classes=3, id2label=NAMES)
    DQForImageGeneration.from_models(vae, transformer).save_pretrained(root / "model")
    rng = np.random.default_rng(0)
    for name, number in PER_CLASS.items():
        (root / "data" / "test" / name).mkdir(parents=True)
        for index in range(number):
            coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((20, 24), Image.BICUBIC).save(root / f"data/test/{name}/{index}.png")
    return root


@pytest.fixture(scope="module")
def vae(place):
    return DQVAEModel.from_pretrained(place / "model" / "vae")


@pytest.fixture(scope="module")
def pipe(place):
    return DQPipeline.from_pretrained(place / "model")


@pytest.fixture(scope="module")
def extractor():
    return EfficientNetLite0Extractor()


@pytest.fixture(scope="module")
def networks(extractor):
    return {"extractor": extractor, "perceptual": EfficientNetLitePerceptualLoss()}


@pytest.fixture
def generation(place, pipe, extractor):
    """Evaluates samples in a folder, with other settings if any are given."""

    def generation(folder, data=place / "data", **settings):
        settings = dict(num_images=8, batch_size=3, extractor=extractor) | settings
        return evaluate_generation(pipe, "tiny", data, "test", folder, **settings)

    return generation


def pictures(folder):
    """The samples of a folder, {name: pixels}."""
    return {path.name: np.array(Image.open(path)).tolist() for path in sorted(folder.glob("[0-9]*.png"))}


def prepared(place):
    """The real images, sorted by name, as the models see them: (path, pixel values), of 8 bits."""
    processor = DQImageProcessor(size={"height": 16, "width": 16})
    for path in sorted((place / "data").rglob("*.png")):
        image = processor.post_process(processor(Image.open(path))["pixel_values"])[0]
        yield path, processor(image)["pixel_values"]


def to_array(pixel_values):
    return np.array(DQImageProcessor().post_process(pixel_values)[0])


# Reconstruction


def test_reconstruction_figures_are_those_of_images_one_by_one(place, vae, networks, tmp_path):
    report = evaluate_reconstruction(vae, "tiny", place / "data", "test", batch_size=4, **networks)
    options, values = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2), []
    for _, pixel_values in prepared(place):
        encoded = vae.encode(pixel_values)
        x, y = to_array(pixel_values), to_array(vae.decode_codes(encoded.codes).sample)
        similarity = structural_similarity(x, y, **options)
        num_codes = sum(1 if region == 0 else 4 for region in encoded.grain_map.flatten().tolist())
        values.append((peak_signal_noise_ratio(x, y), similarity, num_codes, 4 * num_codes + 4))
    results = report["results"]
    found = [results[name] for name in ("PSNR", "SSIM", "codes", "bits")]
    np.testing.assert_allclose(found, np.mean(values, axis=0), rtol=1e-3)
    assert 4 < results["codes"] < 16  # both granularities occur
    assert {"rFD-EffLite0", "PD-EffLite0", "PSNR of mean error", "codebook usage", "perplexity"} < set(results)
    assert not {"FID", "rFID", "LPIPS"} & set(results)
    write_report({"protocol": {}, "results": {"PSNR": math.inf, "SSIM": 1.0}}, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["results"] == {"PSNR": "inf", "SSIM": 1.0}


# Likelihood


def test_likelihood_figures_are_those_of_images_one_by_one(place):
    model = DQForImageGeneration.from_pretrained(place / "model")
    values = []
    for path, pixel_values in prepared(place):
        encoded = model.vae.encode(pixel_values)
        label = torch.tensor([model.config.label2id[path.parent.name]])
        with torch.no_grad():
            output = model.transformer.log_prob(encoded.codes, encoded.grain_map, label)
        contents = [0.0, 0.0]
        for value, granularity in zip(output.content_log_probs[0].tolist(), output.stream.granularities[0].tolist()):
            contents[granularity] -= value / math.log(2)
        values.append((output.nats.item(), *contents, encoded.num_codes.item()))
    expected = np.mean(values, axis=0)
    for batch_size in (1, 4):
        report = evaluate_likelihood(model, "tiny", place / "data", "test", batch_size=batch_size)
        results = report["results"]
        found = [results[name] for name in ("nats", "bits of 8x8 contents", "bits of 4x4 contents", "codes")]
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        parts = sum(value for name, value in results.items() if name.endswith(("positions", "contents")))
        assert results["bits"] == pytest.approx(parts) == pytest.approx(results["nats"] / math.log(2))
        assert results["bits of 4x4 positions"] == 0 and results["bits of 8x8 positions"] > 0
        assert results["bits of fixed length"] == pytest.approx(4 * expected[3] + 4)
    assert report["protocol"]["evaluation"] == "likelihood" and report["protocol"]["transformer_fingerprint"]


@pytest.fixture(scope="module")
def captioned(place):
    """A `DQPipeline` with text for the images of `place`, and a folder with six of them and captions."""
    vae = DQVAEModel.from_pretrained(place / "model" / "vae")
    parts = vae, make_transformer(grid_sizes=[[2, 2], [4, 4]], **TEXT), make_text_encoder(), make_text_tokenizer()
    images = [Image.open(path) for path in sorted((place / "data").rglob("*.png"))[:6]]
    captions = [["sun"], ["a red heart"], ["blue"], ["a sun"], ["heart"], ["red and blue"]]
    folder = place / "captioned"
    folder.mkdir()
    rows = {"image": images, "caption": captions, "partly": [*captions[:4], [], None]}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(folder / "test-0.parquet")
    return DQPipeline(*parts), folder


def test_captions_are_prompts_and_what_likelihood_knows(captioned, tmp_path, extractor):
    pipe, folder = captioned
    reports = {
        column: evaluate_likelihood(pipe, "tiny", folder, "test", caption_column=column, batch_size=4)
        for column in (None, "caption")
    }
    assert reports[None]["results"]["nats"] != reports["caption"]["results"]["nats"]
    assert reports["caption"]["protocol"]["captions"] == "caption" and "captions" not in reports[None]["protocol"]
    with pytest.raises(ValueError, match="got 2 of 6"):
        evaluate_likelihood(pipe, "tiny", folder, "test", caption_column="partly")
    options = dict(caption_column="caption", num_images=8, batch_size=3, extractor=extractor)
    evaluate_generation(pipe, "tiny", folder, "test", tmp_path / "samples", **options)
    order = np.random.default_rng(0).permutation(6)
    captions = ["sun", "a red heart", "blue", "a sun", "heart", "red and blue"]
    prompts = [captions[order[i % 6]] for i in range(8)]
    expected = pipe(prompts, generator=torch.Generator().manual_seed(0)).images
    for i, image in enumerate(expected):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "samples" / f"{i:06d}.png"))), i
    with torch.no_grad():
        other = copy.deepcopy(pipe.text_encoder)
        next(other.parameters()).add_(0.1)
    with pytest.raises(ValueError, match="text_fingerprint"):
        other = DQPipeline(pipe.vae, pipe.transformer, other, pipe.tokenizer)
        evaluate_generation(other, "tiny", folder, "test", tmp_path / "samples", **options)


def test_the_protocol_of_a_reconstruction_says_what_was_measured_and_how(place, vae, networks):
    def evaluated(**settings):
        return evaluate_reconstruction(vae, "tiny", place / "data", "test", **networks, **settings)

    whole, in_batches = evaluated(), evaluated(batch_size=3)
    protocol = whole["protocol"]
    assert protocol == in_batches["protocol"]
    assert whole["results"] == pytest.approx(in_batches["results"], rel=1e-4)
    assert protocol["image_size"] == [16, 16] and protocol["num_references"] == 10 and protocol["crop"] == "centre"
    assert protocol["versions"]["torch"] == torch.__version__ and protocol["device"] == "cpu"
    parts = [evaluated(num_images=6, seed=seed)["protocol"] for seed in (0, 0, 1)]
    assert [part["references_drawn_by_seed"] for part in parts] == [0, 0, 1]
    hashes = [part["references_sha256"] for part in parts]
    assert hashes[0] == hashes[1] and len({*hashes, protocol["references_sha256"]}) == 3
    fine = evaluated(fine_ratio=1.0)
    assert fine["results"]["codes"] == 16 and fine["protocol"]["fine_ratio"] == 1.0
    assert evaluated(fine_ratio=0.25)["results"]["codes"] == 3 + 4


def test_the_reconstruction_command_prints_and_writes_the_same(place, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(place)
    report = tmp_path / "report.json"
    command = ["evaluate", "reconstruction", "--model", "model", "--data", "data", "--output", str(report)]
    command += ["--extractor", "efficientnet-lite0", "--perceptual", "efficientnet-lite0", "--fine-ratio", "0.5"]
    main(command)
    printed = dict(line.split("  ", 1) for line in capfd.readouterr().out.splitlines())
    written = json.loads(report.read_text())
    assert written["protocol"]["model"] == "model" and written["protocol"]["split"] == "test"
    assert written["protocol"]["fine_ratio"] == [0.5]
    figures = {name.strip(): float(text.split()[0]) for name, text in printed.items()}
    assert figures == pytest.approx(written["results"], abs=1e-4)
    assert written["results"]["codes"] == 2 + 2 * 4
    before = report.read_bytes()
    with pytest.raises(SystemExit):
        main(command)
    assert "exists; choose another name or give --force" in capfd.readouterr().err and report.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "report.txt"], "--output must end in .json, got report.txt"),
        (["--output", "nowhere/report.json"], "its folder must exist"),
        (["--split", "train"], "has no split 'train'; it has test"),
        (["--num-images", "11"], "has 10 images, got a request for 11"),
        (["--num-images", "1"], "at least 2 images are needed, got 1"),
        (["--extractor", "vgg"], "extractor must be auto or one of"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--fine-ratio", "2"], "--fine-ratio"),
    ],
)
def test_a_refused_evaluation_leaves_no_report(place, tmp_path, capfd, monkeypatch, options, message):
    shutil.copytree(place, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    before = set(tmp_path.rglob("*"))
    settings = ["--output", "r.json", "--extractor", "efficientnet-lite0", "--perceptual", "efficientnet-lite0"]
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "reconstruction", "--model", "model", "--data", "data", *settings, *options])
    assert stop.value.code == 1 and message in capfd.readouterr().err
    assert set(tmp_path.rglob("*")) == before


# Generation


def test_samples_are_those_of_the_pipeline_in_any_batch(pipe, generation, tmp_path):
    report = generation(tmp_path / "a", label_rule="balanced", seed=5)
    generation(tmp_path / "b", label_rule="balanced", seed=5, num_images=5, batch_size=5)
    generator = torch.Generator().manual_seed(5)
    expected = pipe(class_labels=[0, 1, 2, 0, 1, 2, 0, 1], generator=generator).images
    names = [f"{number:06d}.png" for number in range(8)]
    assert pictures(tmp_path / "a") == {name: np.array(image).tolist() for name, image in zip(names, expected)}
    smaller = pictures(tmp_path / "b")
    assert list(smaller) == names[:5] and smaller.items() <= pictures(tmp_path / "a").items()
    assert report["protocol"]["class_labels"] == "balanced" and report["protocol"]["seed"] == 5
    generation(tmp_path / "b", label_rule="balanced", seed=5)  # a larger set goes on
    assert pictures(tmp_path / "b") == pictures(tmp_path / "a")


def test_generation_figures_are_those_of_the_files(place, generation, extractor, tmp_path):
    report = generation(tmp_path / "samples")
    samples = torch.tensor(list(pictures(tmp_path / "samples").values()), dtype=torch.uint8).permute(0, 3, 1, 2)
    real = torch.cat([pixel_values for _, pixel_values in prepared(place)]) / 2 + 0.5
    features = [extractor.features(images).double().numpy() for images in (samples.float() / 255, real)]
    expected = slow_frechet_distance(*features)
    assert report["results"]["FD-EffLite0"] == pytest.approx(expected, rel=1e-3)
    assert set(report["results"]) == {"FD-EffLite0", "IS-EffLite0", "precision-EffLite0", "recall-EffLite0"}
    assert report["protocol"]["num_images"] == 8 and report["protocol"]["num_references"] == 10


def test_labels_are_those_of_the_real_images_mixed(place, pipe, generation, tmp_path):
    dataset = ReferenceImages(pipe.vae, place / "data", "test").dataset
    labels = label_cycle(pipe.transformer.config, dataset, "reference", "label", seed=0)
    assert Counter(NAMES[label] for label in labels) == PER_CLASS and labels != sorted(labels)
    assert labels != label_cycle(pipe.transformer.config, dataset, "reference", "label", seed=1)
    report = generation(tmp_path / "samples", num_images=None)
    assert report["protocol"]["num_images"] == 10 and report["protocol"]["class_labels"] == "reference"
    expected = pipe(class_labels=labels, generator=torch.Generator().manual_seed(0)).images
    assert list(pictures(tmp_path / "samples").values()) == [np.array(image).tolist() for image in expected]


def test_labels_may_be_names(pipe):
    rows = datasets.Dataset.from_dict({"label": [*NAMES.values(), NAMES[0]]})
    assert reference_labels(pipe.transformer.config, rows, "label") == [*NAMES, 0]
    rows = datasets.Dataset.from_dict({"label": [NAMES[0], "cloud"]})
    with pytest.raises(ValueError, match="no class 'cloud' as the real images do; take images with the labels that"):
        reference_labels(pipe.transformer.config, rows, "label")
    with pytest.raises(ValueError, match='do; use "balanced" class labels, or take images with the labels that the'):
        label_cycle(pipe.transformer.config, rows, "reference", "label", seed=0)


@pytest.mark.parametrize("hidden", [-1, None])
def test_hidden_labels_are_refused(pipe, hidden):
    kinds = datasets.Features({"label": datasets.ClassLabel(names=list(NAMES.values()))})
    rows = datasets.Dataset.from_dict({"label": [0, hidden, 1]}, features=kinds)
    with pytest.raises(ValueError, match=f"1 rows of 3 whose label is no class, such as {hidden} "):
        reference_labels(pipe.transformer.config, rows, "label")


def test_unknown_labels_and_too_few_images_are_refused_before_any_is_made(place, generation, tmp_path):
    shutil.copytree(place / "data", tmp_path / "data")
    (tmp_path / "data/test/sun").rename(tmp_path / "data/test/cloud")
    for settings, message in (
        (dict(data=tmp_path / "data"), "no class 'cloud' as the real images do; use \"balanced\""),
        (dict(label_column="kind"), "label column 'kind' must hold class labels: .* use \"balanced\""),
        (dict(num_images=3), "at least 4 samples are needed, got 3"),
        (dict(num_references=3), "at least 4 references are needed, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            generation(tmp_path / "samples", **settings)
    assert not (tmp_path / "samples").exists()


def test_what_is_missing_is_sampled_and_the_rest_is_kept(generation, tmp_path):
    folder = tmp_path / "samples"
    report = generation(folder)
    before = pictures(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    for number in (0, 4, 5):
        (folder / f"{number:06d}.png").unlink()
    again = generation(folder, batch_size=8)
    assert again["protocol"] == report["protocol"] and again["results"] == pytest.approx(report["results"], rel=1e-4)
    assert pictures(folder) == before
    kept = [path for path in times if path.stat().st_mtime_ns == times[path]]
    assert len(kept) == 6  # five samples and the protocol


def test_samples_of_another_making_are_never_mixed_and_damaged_ones_are_named(generation, tmp_path):
    folder = tmp_path / "samples"
    generation(folder)
    before = pictures(folder)
    for settings, difference in (
        ({"seed": 1}, "seed was 0, now 1"),
        ({"sampling": {"top_k": 3}}, "sampling was {}, now {'top_k': 3}"),
        ({"label_rule": "balanced"}, "class_labels was reference, now balanced"),
    ):
        with pytest.raises(ValueError, match="made in another way") as caught:
            generation(folder, num_images=9, **settings)
        assert difference in str(caught.value)
    protocol, sample = folder / "protocol.json", folder / "000003.png"
    protocol.rename(tmp_path / "protocol.json")
    with pytest.raises(ValueError, match="images but no protocol.json"):
        generation(folder, num_images=9)
    assert pictures(folder) == before
    (tmp_path / "protocol.json").rename(protocol)
    sample.write_bytes(sample.read_bytes()[:60])
    with pytest.raises(OSError, match="000003.png is missing or damaged .* delete it and run again"):
        generation(folder)
    Image.new("RGB", (8, 16)).save(sample)
    with pytest.raises(OSError, match="000003.png must be 16x16, got 8x16"):
        generation(folder)


@pytest.mark.slow
def test_two_processes_killed_and_started_again_give_the_set_and_figures_of_one(place, tmp_path, generation, capfd):
    folder, report = tmp_path / "samples", tmp_path / "report.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "dq_hf"]
    command = [*launch, "evaluate", "generation", "--model", "model", "--data", "data", "--batch-size", "1"]
    command += ["--image-dir", folder, "--output", report, "--extractor", "efficientnet-lite0"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen([*command, "-n", "1000"], cwd=place, env=environment) as launcher:
        while len(list(folder.glob("[0-9]*.png"))) < 3:
            assert launcher.poll() is None
            time.sleep(0.02)
        workers = psutil.Process(launcher.pid).children()
        for process in (launcher, *workers):
            process.kill()
        psutil.wait_procs(workers)
    done = sorted(pictures(folder))
    assert len(workers) == 2 and 3 <= len(done) < 1000 and not report.exists()
    assert {int(name.removesuffix(".png")) % 2 for name in done} == {0, 1}  # each process its own
    number = int(done[-1].removesuffix(".png")) + 6
    subprocess.run([*command, "-n", str(number)], cwd=place, env=environment, check=True)
    written = json.loads(report.read_text())
    alone = generation(tmp_path / "alone", num_images=number, batch_size=7, sampling={"fine_positions": "fixed"})
    assert pictures(folder) == pictures(tmp_path / "alone")
    assert written["results"] == pytest.approx(alone["results"], rel=1e-4)
    assert written["protocol"] == alone["protocol"] | {"model": "model", "data": "data"}
    assert capfd.readouterr().out.count("FD-EffLite0") == 1  # the table, once
