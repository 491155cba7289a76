import hashlib
import io
import itertools
import json
import math
import re
from collections import Counter

import colours
import conditions
import evidence
import generator_cost
import numpy as np
import photographs
import pilot
import pytest
import rankings
import run
import stage_1
import stage_2
import torch
from PIL import Image

from dq_hf.codec.static_prior import StaticPrior
from dq_hf.modeling.configuration_dqvae import DQVAEConfig
from dq_hf.modeling.modeling_dqvae import DQVAEModel

TOKENIZERS = (
    "fixed-64",
    "fixed-128",
    "fixed-256",
    "all-fine",
    "random",
    "entropy",
    "feature",
    "feature-selected",
    "gain",
    "triple",
    "triple-feature",
)
GENERATORS = ("dq-transformer", "raster-256", "raster-128")


def images(count, seed=0):
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """What `run.py --smoke` leaves behind."""
    place = tmp_path_factory.mktemp("dynamic_vs_fixed")
    run.main(run.Arguments(smoke=True, work_dir=str(place)))
    return place / "smoke"


def smoke_arguments(smoke, **changes):
    """The same runs again, as if they were not a smoke test."""
    sizes = dict(seeds=[0], steps=2, seconds=0.5, samples=4, images=16)
    folders = dict(work_dir=str(smoke), results_dir=str(smoke / "results"))
    return run.Arguments(**(sizes | folders | changes))


@pytest.mark.slow
def test_smoke_runs_every_condition_and_reports_it(smoke):
    results = {path.name: json.loads(path.read_text()) for path in (smoke / "results/emoji").glob("*-seed0.json")}
    assert sorted(results) == sorted(f"{name}-seed0.json" for name in TOKENIZERS + GENERATORS)
    codes = {"fixed-64": {"own": 64}, "fixed-128": {"own": 128}, "fixed-256": {"own": 256}, "random": {"own": 127}}
    codes |= {"all-fine": {"own": 256}} | {name: {"exact": 127} for name in ("entropy", "feature", "gain", "triple")}
    for name, expected in codes.items():
        held_out = results[f"{name}-seed0.json"]["held_out"]
        assert set(held_out) == {"own", *expected}
        for way, count in expected.items():
            assert held_out[way]["images"]["codes"] == [count] * 16
        for figures in held_out.values():
            assert {len(values) for values in figures["images"].values()} == {16}
    report = (smoke / "evidence.md").read_text()
    for name in TOKENIZERS:
        assert re.search(rf"^\| {name} \| .* \| 1 of 3 \|$", report, flags=re.MULTILINE)
    for name, tokenizer in zip(GENERATORS, ("entropy", "fixed-256", "fixed-128")):
        assert re.search(rf"^\| {name} \| {tokenizer} \| .* \| 1 of 3 \|$", report, flags=re.MULTILINE)
    for name in GENERATORS:
        assert results[f"{name}-seed0.json"]["steps"] == math.ceil(0.5 / stage_2.SECONDS_A_STEP[name])
    assert "(images/dynamic_vs_fixed-emoji.png)" in report
    assert Image.open(smoke / "images/dynamic_vs_fixed-emoji.png").size[0] > 500


@pytest.mark.slow
def test_every_tokenizer_is_measured_with_every_ranking(smoke, tmp_path):
    args = dict(images=8, work_dir=str(smoke), output=str(tmp_path / "report.md"))
    rankings.main(rankings.Arguments(**args))
    rows = [
        line.split("|")[1:-1] for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("|")
    ]
    assert [cell.strip() for cell in rows[0]] == ["trained with", "random", "entropy", "feature", "the gain itself"]
    assert [row[0].strip() for row in rows[2:]] == ["`random`", "`entropy`", "`feature`"]
    with pytest.raises(FileNotFoundError, match="random-seed1.safetensors not found; train it with run.py"):
        rankings.main(rankings.Arguments(**args, seed=1))


@pytest.mark.slow
def test_the_colours_of_every_tokenizer_are_measured(smoke, tmp_path):
    colours.main(colours.Arguments(images=8, work_dir=str(smoke), output=str(tmp_path / "report.md")))
    rows = [line.split("|")[1] for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("|")]
    assert [row.strip(" `") for row in rows[2:]] == list(TOKENIZERS)


def test_colours_of_no_tokenizer_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load_split", lambda *args: (images(1), [0]))
    with pytest.raises(FileNotFoundError, match="no weights in .*; train tokenizers with run.py"):
        colours.main(colours.Arguments(work_dir=str(tmp_path), output=str(tmp_path / "report.md")))
    assert not (tmp_path / "report.md").exists()


def test_brightness_and_colour_are_told_apart():
    batch = images(4)
    grey, colour = colours.split(batch)
    assert torch.allclose(
        colours.split(colour)[0], torch.zeros(4, 1, 64, 64), atol=1e-3
    )  # no brightness is left in it
    brightness, colours_decibels, kept = colours.measure(grey.expand_as(batch), batch).values()
    assert brightness > 70 and kept == pytest.approx(0, abs=1e-3)
    assert colours_decibels == pytest.approx(colours.decibels(torch.zeros_like(colour), colour), abs=0.01)
    brightness, colours_decibels, kept = colours.measure(
        batch + 0.02, batch
    ).values()  # lighter by a hundredth of the range
    assert brightness == pytest.approx(40, abs=0.1) and colours_decibels > 70 and kept == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_finished_runs_are_kept_and_only_what_is_missing_is_done_again(smoke):
    folder = smoke / "results/emoji"
    before = {path: path.read_text() for path in folder.iterdir()}
    weights = {path: path.stat().st_mtime_ns for path in (smoke / "emoji").iterdir()}
    untouched = {path: path.stat().st_mtime_ns for path in folder.glob("*-seed0.json")}
    removed = folder / "entropy-seed0.json"
    removed.unlink(), untouched.pop(removed)
    run.main(smoke_arguments(smoke))
    assert {path: path.read_text() for path in folder.iterdir()} == before
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert {path: path.stat().st_mtime_ns for path in weights} == weights  # measured again, not trained again


@pytest.mark.slow
def test_a_run_that_was_lost_gives_the_same_figures_again(smoke):
    result, weights = smoke / "results/emoji/random-seed0.json", smoke / "emoji/random-seed0.safetensors"
    before = json.loads(result.read_text())
    result.unlink(), weights.unlink()
    run.main(smoke_arguments(smoke, conditions=["random"]))
    after = json.loads(result.read_text())
    assert after.pop("seconds_per_step") > 0 and before.pop("seconds_per_step") > 0
    assert after == before


@pytest.mark.slow
def test_weights_and_results_of_other_settings_are_refused(smoke, tmp_path):
    args = smoke_arguments(smoke, steps=3, results_dir=str(tmp_path), conditions=["fixed-64"])
    with pytest.raises(ValueError, match="fixed-64-seed0.safetensors must be of a run with .*'steps': 3"):
        run.main(args)
    with pytest.raises(ValueError, match="fixed-64-seed0.json must be of a run with .*'steps': 3.*'steps': 2"):
        run.main(smoke_arguments(smoke, steps=3, conditions=["fixed-64"]))
    folders = dict(work_dir=str(tmp_path), results_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="run stage 1 of fixed-256, seed 0 first"):
        run.main(smoke_arguments(smoke, **folders, conditions=["raster-256"]))


@pytest.mark.parametrize("changes", [{"data": ["faces"]}, {"conditions": ["fixed-100"]}, {"stages": [3]}])
def test_what_is_not_there_to_run_is_refused(changes):
    with pytest.raises(
        ValueError, match=f"{next(iter(changes))} must be of .*, got {next(iter(changes.values()))[0]}"
    ):
        run.main(run.Arguments(**changes))


def test_tokenizers_have_equally_many_parameters_and_dynamic_ones_128_codes_on_average():
    counts = []
    for name, condition in conditions.CONDITIONS.items():
        model = conditions.make_model(condition)
        if condition.taught is not None:  # the router alone learns
            model.router = None
        counts.append(model.num_parameters())
        if name in ("random", "entropy", "feature", "gain", "triple"):
            shares = [1 - sum(condition.shares), *condition.shares]
            regions = (64 // condition.granularities[0]) ** 2
            assert regions * sum(4**g * share for g, share in enumerate(shares)) == pytest.approx(128)
    assert len(counts) == len(TOKENIZERS) and max(counts) < 1.01 * min(counts)
    grain_maps = conditions.random_grain_map(conditions.CONDITIONS["random"], 500, torch.Generator().manual_seed(0))
    assert grain_maps.flatten(1).sum(1).tolist() == [21] * 500  # of 64 regions
    hits = grain_maps.sum(0)
    assert 110 < hits.min() and hits.max() < 220  # 164 expected, four standard deviations of 10.5 are 42


def test_a_grid_of_strides_two_is_the_library_model():
    condition = conditions.CONDITIONS["fixed-64"]
    ours = conditions.make_model(condition).eval()
    config = DQVAEConfig(
        **conditions.SIZES,
        granularities=condition.granularities,
        block_out_channels=condition.widths,
        decoder_block_out_channels=condition.decoder_widths,
    )
    theirs = DQVAEModel(config).eval()
    theirs.load_state_dict(ours.state_dict())
    pixel_values = images(2)
    a, b = ours(pixel_values), theirs(pixel_values)
    assert torch.equal(a.codes, b.codes) and torch.equal(a.sample, b.sample)
    assert torch.equal(a.loss, b.loss) and torch.equal(a.num_codes, b.num_codes)


def test_pilot_chooses_the_best_learning_rate_and_says_what_more_steps_gain(tmp_path):
    args = pilot.Arguments(results_dir=str(tmp_path / "pilot"), output=str(tmp_path / "tables.md"), report=True)
    for rate, steps, psnr in ((5e-4, 1000, 16.0), (1e-3, 1000, 19.0), (2e-3, 1000, 18.0), (1e-3, 3000, 21.5)):
        place = tmp_path / "pilot" / pilot.setting(rate, steps) / "emoji"
        run.write_json(place / "entropy-seed0.json", result("entropy", 0, [psnr - 1, psnr + 1], 128.0, 1152.0))
    pilot.main(args)
    report = (tmp_path / "tables.md").read_text()
    assert "| entropy | 0.002 | 1,000 | 18.00 |  |" in report
    assert "| entropy | 0.001 | 3,000 | 21.50 | +1.25 |" in report
    assert "6,000" not in report and "fixed-256" not in report


def test_bootstrap_agrees_with_all_draws_there_are():
    differences = np.array([[0.0, 1.0, 2.0, 5.0, -3.0], [1.0, 1.5, 4.0, 2.0, -1.0]])
    groups = np.array([7, 7, 2, 9, 2])
    members = [[0, 1], [2, 4], [3]]
    means = []
    for seeds in itertools.product(range(2), repeat=2):
        for drawn in itertools.product(members, repeat=3):
            chosen = [image for group in drawn for image in group]
            means.append(np.mean([differences[seed][chosen].mean() for seed in seeds]))
    assert len(means) == 4 * 27
    low, high = evidence.bootstrap(differences, groups, num_resamples=200_000)
    assert (low, high) == pytest.approx(np.percentile(means, [2.5, 97.5], method="inverted_cdf"), abs=1e-9)


def test_the_fixed_length_curve_is_linear_in_the_logarithm():
    values = [np.array([1.0, 10.0]), np.array([3.0, 20.0]), np.array([4.0, 0.0])]
    for rate, expected in (
        (64, [1, 10]),
        (128, [3, 20]),
        (256, [4, 0]),
        (64 * math.sqrt(2), [2, 15]),
        (128 * 2**0.25, [3.25, 15]),
        (32, [-1, 0]),  # the nearest two, continued
        (512, [5, -20]),
    ):
        assert evidence.interpolate(rate, [64, 128, 256], values).tolist() == pytest.approx(expected)


def result(name, seed, psnr, codes, bits, way="own", steps=5):
    """A finished tokenizer run with these per-image PSNRs."""
    lists = {"codes": [codes] * len(psnr), "psnr": psnr, "ssim": [0.5] * len(psnr), "perceptual": [0.25] * len(psnr)}
    figures = {"codes": codes, "bits": bits, "shares": [1.0], "FD-EffLite0": 10.0, "images": lists}
    common = {"data_sha256": "x", "steps": steps, "batch_size": 2, "learning_rate": 0.1, "num_parameters": 1234}
    return common | {"condition": name, "seed": seed, "held_out": {way: figures}, "versions": {"torch": "2"}}


def test_report_says_what_is_measured_and_leaves_out_what_is_not(tmp_path):
    folder = tmp_path / "results" / "emoji"
    finished = [
        result("fixed-64", 0, [10.0, 20.0], 64.0, 576.0),
        result("fixed-64", 1, [12.0, 22.0], 64.0, 576.0),
        result("fixed-128", 0, [12.0, 22.0], 128.0, 1152.0),
        result("fixed-256", 0, [14.0, 24.0], 256.0, 2304.0),
        # One dB above the curve at 64 sqrt(2) codes, and at four times its bits two dB below it.
        result("entropy", 0, [12.0, 22.0], 64 * math.sqrt(2), 576 * math.sqrt(2) * 4),
    ]
    for one in finished:
        run.write_json(folder / f"{one['condition']}-seed{one['seed']}.json", one)
    run.write_json(folder / "held_out.json", {"groups": [0, 1]})
    output = tmp_path / "docs" / "evidence.md"
    output.parent.mkdir()
    evidence.main(
        evidence.Arguments(str(tmp_path / "results"), output=str(output), images_dir=str(output.parent / "images"))
    )
    report = output.read_text()
    error = -10 * math.log10((1e-1 + 1e-2 + 10**-1.2 + 10**-2.2) / 4)  # of both seeds; the table has the mean of two
    each = [-10 * math.log10((10**-a + 10**-b) / 2) for a, b in ((1.0, 2.0), (1.2, 2.2))]
    assert abs(np.mean(each) - error) > 0.05
    assert (
        f"| fixed-64 |  | 64.0 | 576 | 16.00 ± 1.00 | 0.5000 | 0.2500 | {np.mean(each):.2f} ± 1.00 | 10.0 |" in report
    )
    assert "| 1.000 | 1,234 | 2 of 3 |" in report
    assert "feature" not in report
    assert "| entropy, its own choice | fixed-length at equal codes | +1.00 [+1.00, +1.00] better |" in report
    assert "| entropy, its own choice | fixed-length at equal bits | -3.00 [-3.00, -3.00] worse |" in report
    assert "+0.0000 [+0.0000, +0.0000] open" in report
    assert "dq-transformer" not in report
    assert "2 held-out images in 2 independent groups" in report
    with pytest.raises(ValueError, match="must have the same settings, got .*'steps': 5.* and .*'steps': 6"):
        evidence.common_settings([finished[0], finished[1] | {"steps": 6}], [0, 1])


def generated(name, seed, **changes):
    """A finished generator run."""
    figures = {"elements": 130.0, "nats": [500.0, 700.0], "FD-EffLite0": 30.0 + seed, "seconds_per_sample": 0.25}
    figures |= {"tokenizer-FD-EffLite0": 10.0 + seed, "precision-EffLite0": 0.5 + seed / 10, "recall-EffLite0": 0.25}
    settings = {"data_sha256": "x", "seconds": 5.0, "batch_size": 2, "learning_rate": 0.1, "samples": 8}
    facts = {"condition": name, "seed": seed, "num_parameters": 1234, "steps": 50 + seed, "held_out": figures}
    return facts | settings | changes


def test_a_generator_stands_beside_its_tokenizer():
    table = evidence.generators_table([generated("dq-transformer", seed) for seed in (0, 1)])
    row = "| 130.0 | 1,234 | 50 ± 0 | 600.0 | 30.5 ± 0.5 | 10.5 ± 0.5 | 0.55 ± 0.05 | 0.25 | 0.250 | 2 of 3 |"
    assert f"| dq-transformer | entropy {row}" in table and "raster-256" not in table


def test_a_generator_of_before_precision_was_measured_has_a_dash_for_it():
    runs = [generated("dq-transformer", seed) for seed in (0, 1)]
    del runs[1]["held_out"]["precision-EffLite0"]
    assert "| 30.5 ± 0.5 | 10.5 ± 0.5 | – | 0.25 | 0.250 | 2 of 3 |" in evidence.generators_table(runs)


@pytest.mark.parametrize("name", ["dq-transformer", "raster-256"])
@pytest.mark.parametrize(
    "change", [{"data_sha256": "y"}, {"seconds": 6.0}, {"batch_size": 3}, {"learning_rate": 0.2}, {"samples": 9}]
)
def test_generators_of_different_settings_are_not_put_into_one_table(name, change):
    ((setting, value),) = change.items()
    with pytest.raises(ValueError, match=f"must have the same settings, got .* and .*'{setting}': {value!r}"):
        evidence.generators_table([generated("dq-transformer", 0), generated(name, 1, **change)])


def test_generators_learn_from_batches_of_similar_length_and_see_every_image_once_an_epoch():
    grain_maps = (
        torch.rand(160, 8, 8, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, 160)[:, None, None]
    ).long()
    grain_maps = grain_maps[torch.randperm(160, generator=torch.Generator().manual_seed(1))]
    fine = grain_maps.flatten(1).sum(1)
    epochs = [
        list(itertools.islice(batches, 10)) for batches in [stage_2.batches_of_similar_length(grain_maps, 0)] * 2
    ]
    for epoch in epochs:
        assert sorted(torch.cat(epoch).tolist()) == list(range(160))
        assert max(fine[rows].max() - fine[rows].min() for rows in epoch) < 16  # of 64, where all images span 60
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))


def test_the_cost_of_every_generator_is_measured(capsys):
    generator_cost.main(generator_cost.Arguments(images=16, rounds=1, steps=1))
    lines = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r"(\S+): (\d\.\d{4}) s a step, \d\.\d{4} to \d\.\d{4}", line) for line in lines]
    assert [match[1] for match in found] == list(GENERATORS) and all(float(match[2]) > 0 for match in found)


def test_what_a_tokenizer_spends_is_also_measured_in_coded_bits(tmp_path):
    """64 sqrt(2) codes are halfway between the grids; so many coded bits as of 256 codes are at the grid of 256."""
    finished = [
        result(name, 0, [psnr], codes, 8 * codes)
        for name, psnr, codes in (("fixed-64", 10.0, 64.0), ("fixed-128", 12.0, 128.0), ("fixed-256", 14.0, 256.0))
    ]
    finished.append(result("random", 0, [15.0], 64 * math.sqrt(2), 700.0))
    for one, count in zip(finished, (60, 120, 240, 240)):
        one["held_out"]["own"]["images"]["bytes"] = [count]
    runs = evidence.by_row(finished)
    table = evidence.rates_table(runs)
    assert "| codes | bits | coded bits |" in table and "| 90.5 | 700 | 1920 | 15.00 |" in table
    claims = evidence.claim_table(runs, [0])
    assert "| random | fixed-length at equal codes | +4.00 " in claims
    assert "| random | fixed-length at equal coded bits | +1.00 " in claims
    del finished[0]["held_out"]["own"]["images"]["bytes"]  # one of an older protocol
    assert "coded bits" not in evidence.rates_table(evidence.by_row(finished))


def test_routers_are_compared_with_one_another_in_the_same_way():
    finished = [result(name, 0, [psnr], 127.0, 1080.0) for name, psnr in (("random", 10.0), ("entropy", 12.0))]
    finished.append(result("feature", 0, [13.0], 127.0, 1080.0))
    for one, psnr in zip(finished[1:], (11.5, 11.0)):
        one["held_out"]["exact"] = result(one["condition"], 0, [psnr], 127.0, 1080.0)["held_out"]["own"]
    claims = evidence.claim_table(evidence.by_row(finished), [0])
    for ours, theirs, difference in (
        ("feature, its own choice", "random", "+3.00"),
        ("feature, exact shares", "random", "+1.00"),
        ("feature, its own choice", "entropy, its own choice", "+1.00"),
        ("feature, exact shares", "entropy, exact shares", "-0.50"),
    ):
        assert f"| {ours} | {theirs} | {difference} " in claims


def test_the_bytes_of_a_tokenizer_are_those_of_its_static_prior():
    for name in ("fixed-128", "random", "triple"):
        model = conditions.make_model(conditions.CONDITIONS[name]).eval()
        pixel_values = images(3)
        grain_map = None
        if name == "random":
            grain_map = conditions.random_grain_map(conditions.CONDITIONS[name], 3)
        figures = stage_1.measure(model, pixel_values, grain_map)
        with torch.no_grad():
            encoded = model.encode(pixel_values, grain_map=grain_map)
        prior = StaticPrior(model)
        for number, count in enumerate(figures["images"]["bytes"]):
            payload = prior.encode(encoded.codes[number], encoded.grain_map[number])
            codes, grains = prior.decode(payload, encoded.grain_map[number].shape)
            assert len(payload) == count
            assert torch.equal(codes, encoded.codes[number]) and torch.equal(grains, encoded.grain_map[number])


def test_photographs_become_tiles_of_one_split_each(tmp_path):
    source = np.random.default_rng(0)
    pictures = [Image.fromarray(source.integers(0, 256, (256, 400, 3), dtype=np.uint8)) for _ in range(20)]
    package, files = tmp_path / "package", []
    package.mkdir()
    for number, picture in enumerate(pictures):  # half of them inside of a file of resources
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP" if number < 10 else "PNG", lossless=True)
        files.append(buffer.getvalue())
        if number >= 10:
            (package / f"{number}.png").write_bytes(files[-1])
    no_webp = b"RIFF\x04\x00\x00\x00WAVE"
    (package / "pictures.rcc").write_bytes(b"qres" + no_webp + b"\0".join(files[:10]) + b"end")
    found = photographs.find_pictures(package)
    hashes = [hashlib.sha256(content).hexdigest() for content in files]
    assert set(found) == set(hashes)

    rows = [{"package": "p", "version": "1.2", "name": "tower.jpg", "sha256": sha256} for sha256 in hashes]
    with pytest.raises(ValueError, match="expected 1 listed pictures, got 0: missing are tower.jpg of p 1.2"):
        photographs.build(rows[:1], {}, tmp_path)
    counts = photographs.build(rows, found, tmp_path / "tiles")
    tiles = {split: sorted((tmp_path / "tiles" / split).iterdir()) for split in ("train", "test")}
    assert counts == {split: len(paths) for split, paths in tiles.items()}
    for split, paths in tiles.items():
        own = {sha256[:16] for sha256 in hashes if (int(sha256, 16) % 8 == 0) == (split == "test")}
        assert Counter(path.name[:16] for path in paths) == {name: 4 * 6 for name in own}
    # 256 rows of 400 columns stay as they are; six columns of tiles leave 16 pixels over, half of them on the left.
    (tile,) = (tmp_path / "tiles").glob(f"*/{hashes[0][:16]}-07.png")
    assert np.array_equal(Image.open(tile), np.asarray(pictures[0])[64:128, 8 + 64 : 8 + 128])
    loaded, groups = run.load_split(tmp_path / "tiles", "train")
    assert set(Counter(groups).values()) == {24} and loaded.shape == (counts["train"], 3, 64, 64)
