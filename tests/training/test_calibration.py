"""Thresholds that give the shares of regions that were asked for, in a model and in a saved folder."""

import gc
import json
import math
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import full_disk, make_transformer, make_vae
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from dq_hf.data.streams import StreamedImages
from dq_hf.modeling.modeling_dq import DQForImageGeneration
from dq_hf.modeling.modeling_dqvae import DQVAEModel
from dq_hf.modeling.routing_dq import ROUTERS, image_entropy
from dq_hf.training.calibration import RESOLUTION, Calibration, calibrate, save_thresholds, warn_of_shares

THREE = dict(granularities=[4, 2, 1])


def random_images(count, seed=0):
    """Noise whose strength differs between images and places."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1
    return noise * torch.rand(count, 1, 1, 1, generator=generator) * torch.linspace(0.2, 1, 32)


@torch.no_grad()
def shares_of(vae, images):
    """Share of regions that a model puts at each granularity but the coarsest."""
    grain_map = vae.encode(images).grain_map
    return [(grain_map == g).float().mean().item() for g in range(1, len(vae.config.granularities))]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("shares", [[0.1], [0.0], [1.0], [0.3, 0.2], [0.25, 0.0]])
def test_a_calibrated_router_gives_the_wanted_shares(router, shares):
    vae, images = make_vae(router=router, **(THREE if len(shares) == 2 else {})).train(), random_images(40)
    achieved = calibrate(vae, images.split(16), shares)
    assert vae.training and vae.quantizer.training  # as before
    thresholds = vae.router.thresholds.tolist()
    assert thresholds == sorted(thresholds) and len(thresholds) == len(shares)
    assert achieved == pytest.approx(shares, abs=0.01)
    assert shares_of(vae.eval(), images) == pytest.approx(achieved, abs=1e-6)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.77])
@pytest.mark.parametrize("router", ["entropy", "feature"])
def test_a_threshold_is_the_quantile_of_the_scores(router, share):
    vae, images = make_vae(router=router), random_images(50)
    with torch.no_grad():
        if router == "entropy":
            scores = image_entropy(images, 4)
        else:
            logits = vae.encode(images).router_logits
            scores = logits[:, 1] - logits[:, 0]
    scores = np.sort(scores.numpy(), axis=None)  # 3,200 regions
    count = round(share * len(scores))  # that are to be fine
    (achieved,) = calibrate(vae, images.split(7), [share])
    threshold = vae.router.thresholds.item()
    off = RESOLUTION["linear"] if router == "entropy" else 2 * RESOLUTION["relative"] * np.abs(scores).max()
    assert scores[-count - 1] - off <= threshold <= scores[-count] + off
    assert achieved == np.mean(scores > np.float32(threshold)) == pytest.approx(share, abs=0.001)


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e5])
def test_logits_of_any_size_are_calibrated(scale):
    vae, images = make_vae(router="feature", router_activation=None), random_images(30)
    with torch.no_grad():
        vae.router.gate.bias.zero_()
        vae.router.gate.weight.mul_(scale)
    assert calibrate(vae, [images], [0.3]) == pytest.approx([0.3], abs=0.01)
    assert shares_of(vae, images) == pytest.approx([0.3], abs=0.01)


def test_a_feature_router_that_learned_its_budget_with_noise_keeps_it_only_when_calibrated():
    """Trained on the budget alone: its logits stay small beside the noise, and its argmax is nearly always coarse."""
    torch.manual_seed(0)
    vae, images = make_vae(router="feature", budget_targets=[0.3]), random_images(40)
    features = [feature.detach().contiguous() for feature in vae.encoder(images)]
    optimizer = torch.optim.Adam(vae.router.parameters(), lr=0.02)
    drawn = []
    vae.train()
    for _ in range(150):
        routed = vae.router(images, features)
        routed.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        drawn.append(routed.gates[:, 1].mean().item())
    assert np.mean(drawn[-50:]) == pytest.approx(0.3, abs=0.02)
    assert shares_of(vae.eval(), images)[0] < 0.1
    calibrate(vae, images.split(16), [0.3])
    assert shares_of(vae, images) == pytest.approx([0.3], abs=0.005)
    assert shares_of(vae, random_images(40, seed=1)) == pytest.approx([0.3], abs=0.1)


def test_a_threshold_lies_between_entropies_that_are_close():
    images = random_images(1)
    close = images.clone()
    close[:, :, 0, 0] += 1e-4
    both = torch.cat([images] * 50 + [close] * 50)
    low, high = sorted(image_entropy(images, 4)[:, 0, 0].tolist() + image_entropy(close, 4)[:, 0, 0].tolist())
    assert 2 * RESOLUTION["linear"] < high - low < 0.01
    others = image_entropy(images, 4).flatten()
    finer = ((others > high).sum().item() + 0.5) / 64  # half of the images' first regions
    vae = make_vae()
    assert calibrate(vae, [both], [finer]) == pytest.approx([finer], abs=1e-9)
    assert low < vae.router.thresholds.item() < high


def test_calibration_reads_once_and_keeps_nothing():
    sizes = []

    def batches():
        for seed in range(3):
            yield random_images(20, seed)
            gc.collect()
            tensors = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
            sizes.append(sum(tensor.nbytes for tensor in tensors if tensor.layout is torch.strided))

    streamed, stored = make_vae(), make_vae()
    achieved = calibrate(streamed, batches(), [0.5])
    assert sizes[1] == sizes[2]
    assert achieved == calibrate(stored, [torch.cat([random_images(20, seed) for seed in range(3)])], [0.5])
    assert torch.equal(streamed.router.thresholds, stored.router.thresholds)


def test_plain_regions_stay_coarse_together():
    vae, images = make_vae(), random_images(10)
    images[:, :, :16] = 0.5  # half of all regions, of one entropy
    for wanted, possible in ((0.3, 0.3), (0.5, 0.5), (0.8, 0.5), (1.0, 1.0)):
        achieved = calibrate(vae, [images], [wanted])
        assert achieved == pytest.approx([possible], abs=0.01)
        assert shares_of(vae, images) == pytest.approx(achieved, abs=1e-6)
    calibrate(vae, [images], [0.5])  # with room for rounding
    for off in (-1e-4, 1e-4):
        vae.router.thresholds += off
        assert shares_of(vae, images) == pytest.approx([0.5], abs=1e-6)


@pytest.mark.parametrize(
    ("batches", "shares", "message"),
    [
        ([], [0.5], "at least one image, got none"),
        ([torch.zeros(1, 3, 30, 32)], [0.5], "height must be a multiple of 4, got 30; resize"),
        ([torch.zeros(1, 3, 32, 32)], [1.5], r"shares must lie in \[0, 1\]"),
        ([torch.zeros(1, 3, 32, 32)], [0.3, 0.3], r"shares needs 1 share\(s\)"),
    ],
)
def test_calibration_refuses(batches, shares, message):
    vae = make_vae(entropy_thresholds=[0.5])
    with pytest.raises(ValueError, match=message):
        calibrate(vae, batches, shares)
    assert vae.router.thresholds.item() == 0.5


def test_a_damaged_router_is_not_calibrated():
    vae = make_vae(router="feature")
    with torch.no_grad():
        vae.router.gate[0].bias[0] = math.nan
    with pytest.raises(ValueError, match="scores must be finite"):
        calibrate(vae, [random_images(2)], [0.5])


def test_shares_that_are_off_are_warned_of(caplog):
    warn_of_shares([0.31, 0.26], [0.3, 0.3], "held-out images")
    assert not caplog.records
    warn_of_shares([0.31, 0.24], [0.3, 0.3], "held-out images")
    assert "on held-out images: 0.310, 0.240 instead of 0.300, 0.300" in caplog.text


def test_a_stream_calibrates_alike_on_all_processes_in_any_epoch():
    """Each process has epochs of its own."""
    images, plain = random_images(40), Image.new("RGB", (4, 4))
    rows = datasets.Dataset.from_dict({"image": [plain] * 40, "number": range(40)}).to_iterable_dataset()

    def collate(rows):
        return {"pixel_values": images[[row["number"] for row in rows]]}

    options = SimpleNamespace(calibration_images=8, batch_size=4, seed=0, streaming=True, decoder_only=False)
    vaes = make_vae(), make_vae()
    for process, vae in enumerate(vaes):
        stream = StreamedImages(rows, process_index=process, num_processes=2)
        stream.set_epoch(process)
        Calibration(options, vae, stream, collate).run()
        assert stream.epoch == process
    assert torch.equal(*(vae.router.thresholds for vae in vaes))


# Saved folders


def contents_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def saved(folder, kind, **arguments):
    vae = make_vae(entropy_thresholds=[1.25])
    model = vae if kind == "vae" else DQForImageGeneration.from_models(vae, make_transformer())
    model.save_pretrained(folder, **arguments)
    return folder


def thresholds_in(folder):
    if (folder / "vae").is_dir():
        return DQForImageGeneration.from_pretrained(folder).vae.router.thresholds.tolist()
    return DQVAEModel.from_pretrained(folder).router.thresholds.tolist()


@pytest.mark.parametrize("kind", ["vae", "joint"])
def test_saved_thresholds_are_those_that_load_and_nothing_else_changes(tmp_path, kind):
    folder = saved(tmp_path / "model", kind, export_code=True)
    assert thresholds_in(folder) == [1.25]
    before = contents_of(folder)
    place = "vae/" if kind == "joint" else ""
    weights = load_file(folder / place / "model.safetensors")
    save_thresholds(folder, torch.tensor([0.75]), [0.25])
    assert thresholds_in(folder) == [0.75]
    after = contents_of(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    configurations = {f"{place}config.json", "config.json"}
    assert changed == {f"{place}model.safetensors"} | configurations
    for name in configurations:
        config, config_after = json.loads(before[name]), json.loads(after[name])
        config.get("vae_config", config)["budget_targets"] = [0.25]
        assert config_after == config
    with safe_open(folder / place / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    weights_after = load_file(folder / place / "model.safetensors")
    assert weights_after.keys() == weights.keys()
    assert all(torch.equal(value, weights_after[name]) for name, value in weights.items() if "thresholds" not in name)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_thresholds_are_written_into_shards_and_variants(tmp_path, variant):
    folder = saved(tmp_path, "vae", max_shard_size="20KB", variant=variant)
    make_vae().save_pretrained(folder, variant="whole")
    assert len(list(folder.glob("*-of-*"))) > 1
    save_thresholds(folder, torch.tensor([0.75]), [0.25])
    for name in (variant, "whole"):
        assert DQVAEModel.from_pretrained(folder, variant=name).router.thresholds.tolist() == [0.75]


def test_thresholds_that_find_no_room_on_the_disk_change_no_file(tmp_path):
    folder = saved(tmp_path / "model", "joint")
    before = contents_of(folder)
    room = (folder / "config.json").stat().st_size + 100  # for the configurations, not for the weights
    with full_disk(room), pytest.raises(OSError):
        save_thresholds(folder, torch.tensor([0.75]), [0.25])
    assert contents_of(folder) == before
