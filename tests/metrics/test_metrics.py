"""The metrics: against independent implementations, at the edges, in batches and in processes."""

import math
import pickle
import sys
import warnings
from pathlib import Path

import evaluate
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from conftest import in_two_processes
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from slow_metrics import slow_frechet_distance

import dq_hf.metrics
from dq_hf.metrics import (
    PSNR,
    SSIM,
    CodeStatistics,
    FeatureStatistics,
    FrechetDistance,
    InceptionScore,
    PerceptualDistance,
    PrecisionRecall,
    frechet_distance,
    psnr,
    ssim,
)
from dq_hf.networks.extractors import EfficientNetLite0Extractor
from dq_hf.networks.perceptual import LPIPS, EfficientNetLitePerceptualLoss

FOLDER = Path(dq_hf.metrics.__file__).parent
TOLERANCE = 1e-3  # relative, of figures against other implementations; most agree to 1e-9


@pytest.fixture(scope="module")
def extractor():
    return EfficientNetLite0Extractor()


@pytest.fixture(scope="module")
def images():
    """Predictions and references, uint8 (6, 3, 32, 40): noisy copies of coloured ramps."""
    rng = np.random.default_rng(0)
    ramps = np.linspace(0, 255, 32)[:, None] * rng.random((6, 3, 1, 40))
    noisy = ramps + rng.normal(0, rng.uniform(5, 40, (6, 1, 1, 1)), ramps.shape)
    return [torch.from_numpy(array.clip(0, 255).round().astype(np.uint8)) for array in (noisy, ramps)]


def as_floats(image):
    """The same image in [-1, 1]."""
    return image.float() / 127.5 - 1


def all_metrics(extractor):
    """One of each that takes images."""
    return [
        PSNR(),
        SSIM(),
        PerceptualDistance("efficientnet-lite0"),
        FrechetDistance(extractor),
        InceptionScore(extractor),
        PrecisionRecall(extractor),
    ]


def inputs_of(metric, predictions, references):
    """The arguments that a metric of images takes."""
    return {
        name: value
        for name, value in (("predictions", predictions), ("references", references))
        if name in metric.inputs
    }


def assert_close(result, expected):
    """The same names, texts and counts, and figures that agree up to rounding of another batch size."""
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert result[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)


# PSNR and SSIM


def test_psnr_is_that_of_scikit_image(images):
    predictions, references = (batch.numpy() for batch in images)
    expected = [peak_signal_noise_ratio(y, x, data_range=255) for x, y in zip(predictions, references)]
    np.testing.assert_allclose(psnr(*images), expected, rtol=1e-6)
    np.testing.assert_allclose(psnr(*map(as_floats, images)), expected, rtol=1e-4)
    result = PSNR().compute(predictions=images[0], references=images[1])
    assert result["PSNR"] == pytest.approx(np.mean(expected), rel=1e-6)
    together = peak_signal_noise_ratio(references, predictions, data_range=255)
    assert result["PSNR of mean error"] == pytest.approx(together, rel=1e-6)
    assert result["PSNR"] > result["PSNR of mean error"] + 0.1 and result["num_images"] == 6
    black = torch.full((1, 3, 16, 16), -1.0)
    assert psnr(black, -black).item() == 0
    assert psnr(black, black + 0.2).item() == pytest.approx(20, abs=1e-5)  # a tenth of the peak


def test_lists_of_pil_images_are_taken(images):
    pictures = [[Image.fromarray(each.permute(1, 2, 0).numpy()) for each in batch] for batch in images]
    assert torch.allclose(psnr(*pictures), psnr(*images))
    with pytest.raises(ValueError, match="images must have one size, got 8x8, 16x16"):
        psnr([Image.new("RGB", (8, 8)), Image.new("RGB", (16, 16))], images[1][:2])


def test_images_that_seem_to_lie_in_0_to_1_are_told(images):
    unit = [batch.float() / 255 for batch in images]
    metric = PSNR()
    with pytest.warns(
        UserWarning, match=r"read as \[-1, 1\], and no value of these is below 0: .* give uint8 or 2 \* x - 1"
    ):
        metric.add_batch(predictions=unit[0], references=unit[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.add_batch(predictions=as_floats(images[0]), references=as_floats(images[1]))
        psnr(*unit)  # a function is not warned of: one picture may well be without dark pixels


def test_ssim_is_that_of_scikit_image(images):
    options = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=0, data_range=255)
    expected = [structural_similarity(x.numpy(), y.numpy(), **options) for x, y in zip(*images)]
    np.testing.assert_allclose(ssim(*images), expected, rtol=1e-6)
    np.testing.assert_allclose(ssim(*map(as_floats, images)), expected, rtol=1e-4)
    assert SSIM().compute(predictions=images[0], references=images[1])["SSIM"] == pytest.approx(np.mean(expected))
    small = images[0][..., :10]
    with pytest.raises(ValueError, match="at least 11 pixels, got 10x32"):
        ssim(small, small)


def test_equal_images_are_perfect(images):
    both = dict(predictions=images[0], references=images[0])
    assert PSNR().compute(**both) == {"PSNR": math.inf, "PSNR of mean error": math.inf, "num_images": 6}
    assert SSIM().compute(**both)["SSIM"] == pytest.approx(1)
    assert PerceptualDistance("efficientnet-lite0").compute(**both)["PD-EffLite0"] == 0


# Perceptual distance


def test_perceptual_distances_have_the_name_and_the_value_of_their_networks(vgg, heads, images):
    first, second = images[0][:2], images[1][:2]
    metrics = {}
    for name, other, network in (
        ("PD-EffLite0", "LPIPS", EfficientNetLitePerceptualLoss()),
        ("LPIPS", "PD-EffLite0", LPIPS(vgg, heads)),
    ):
        metrics[name] = PerceptualDistance(network)
        result = metrics[name].compute(predictions=first, references=second)
        expected = network.distance(as_floats(first), as_floats(second)).mean().item()
        assert result[name] == pytest.approx(expected, rel=1e-4) and other not in result
        assert result["network"].startswith(f"{name}, weights ")
    assert metrics["LPIPS"].identity != metrics["PD-EffLite0"].identity


def test_auto_takes_the_networks_that_can_be_had(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert PerceptualDistance().figure == "PD-EffLite0"
    assert FrechetDistance().extractor.frechet_distance_name == "FD-EffLite0"
    assert "lpips cannot be had" in caplog.text and "inception-v3 cannot be had" in caplog.text


# Fréchet distance


def statistics(*batches, extractor="some network"):
    result = FeatureStatistics(extractor)
    for batch in batches:
        result.update(torch.as_tensor(batch))
    return result


def feature_pairs(seed, num_first, num_second, width):
    """Correlated features of two different distributions."""
    rng = np.random.default_rng(seed)
    return [
        rng.standard_normal((number, width)) @ rng.standard_normal((width, width)) + shift
        for number, shift in ((num_first, 0.0), (num_second, 0.5))
    ]


@pytest.mark.parametrize("far", [0, 1000])
@pytest.mark.parametrize("numbers", [(200, 150, 12), (500, 40, 33), (9, 7, 12), (2, 2, 5)])
def test_frechet_distance_is_that_of_scipy_also_with_few_samples_in_parts_and_far_from_zero(numbers, far):
    first, second = (features + far for features in feature_pairs(1, *numbers))
    expected = slow_frechet_distance(first, second)
    in_parts = statistics(first[:1], first[1:120], first[120:])
    assert frechet_distance(in_parts, statistics(second)) == pytest.approx(expected, rel=TOLERANCE)
    assert frechet_distance(statistics(second), statistics(first)) == pytest.approx(expected, rel=TOLERANCE)


def torch_fidelity_inputs():
    """What torch-fidelity 0.4.0 was given for the expected values of the tests that name it."""
    rng = np.random.default_rng(2)

    def features(number, width, shift):
        mix = rng.standard_normal((width, width))
        return torch.from_numpy(rng.standard_normal((number, width)) @ mix + shift)

    sets = [[features(first, 12, 0.0), features(second, 12, 0.5)] for first, second in ((200, 150), (9, 7))]
    return sets, torch.from_numpy(rng.standard_normal((50, 12)) * 2)


def test_figures_are_those_of_torch_fidelity(extractor):
    sets, logits = torch_fidelity_inputs()
    expected = [(76.56159250062453, 0.485, 0.2066666667), (180.47516019219935, 1.0, 0.4285714286)]
    for (predictions, references), (distance, precision, recall) in zip(sets, expected):
        both = [FrechetDistance(extractor), PrecisionRecall(extractor)]
        for metric in both:
            metric.add_features(predictions=predictions, references=references)
        result = both[0].compute() | both[1].compute()
        assert result["FD-EffLite0"] == pytest.approx(distance, rel=TOLERANCE)
        assert result["precision-EffLite0"] == pytest.approx(precision, rel=TOLERANCE)
        assert result["recall-EffLite0"] == pytest.approx(recall, rel=TOLERANCE)
    score = InceptionScore(extractor)
    score.add_logits(logits)
    assert score.compute()["IS-EffLite0"] == pytest.approx(2.654633345715176, rel=TOLERANCE)


@pytest.mark.parametrize("number", [2, 7, 300])
def test_equal_sets_have_distance_zero_and_shifted_ones_the_squared_shift(number):
    features, _ = feature_pairs(4, number, number, 20)
    scale = np.cov(features, rowvar=False).trace()
    assert 0 <= frechet_distance(statistics(features), statistics(features.copy())) < 1e-6 * scale
    shifted = statistics(features + np.arange(20.0))
    assert frechet_distance(statistics(features), shifted) == pytest.approx(2470, rel=1e-3)
    same = np.ones((number, 20))
    assert frechet_distance(statistics(same), statistics(same)) == 0


def test_features_of_different_extractors_are_never_mixed():
    first, second = feature_pairs(6, 10, 10, 4)
    ours, theirs = statistics(first, extractor="EfficientNet"), statistics(second, extractor="InceptionV3")
    with pytest.raises(ValueError, match="different extractors cannot be compared, got EfficientNet and InceptionV3"):
        frechet_distance(ours, theirs)
    with pytest.raises(ValueError, match="different extractors"):
        ours + theirs


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (torch.ones(3, 5), ValueError, "4 columns as before, got 5"),
        (torch.full((3, 4), math.nan), ValueError, "finite"),
        (torch.ones(3, 4, dtype=torch.long), TypeError, r"float tensor \(B, D\), got torch.int64 \(3, 4\)"),
    ],
)
def test_features_that_are_no_features_are_refused(features, error, message):
    with pytest.raises(error, match=message):
        statistics(np.ones((3, 4))).update(features)


@pytest.mark.parametrize(
    ("kind", "predictions", "references", "message"),
    [
        (FrechetDistance, 1, 6, "at least 2 predictions, got 1"),
        (FrechetDistance, 6, 0, "at least 2 references, got 0"),
        (PrecisionRecall, 6, 3, "3 neighbours need at least 4 references, got 3"),
        (PrecisionRecall, 0, 6, "at least 4 predictions, got 0"),
    ],
)
def test_too_few_images_are_refused(extractor, images, kind, predictions, references, message):
    numbers = {"predictions": predictions, "references": references}
    batches = {name: batch[: numbers[name]] for name, batch in zip(numbers, images) if numbers[name]}
    with pytest.raises(ValueError, match=message):
        kind(extractor).compute(**batches)


# Precision and recall


def slow_precision(predictions, references, num_neighbours):
    """As the paper says it, one by one."""
    inside = 0
    for sample in predictions:
        hits = []
        for index, centre in enumerate(references):
            others = np.delete(references, index, axis=0)
            radius = np.sort(np.linalg.norm(others - centre, axis=1))[num_neighbours - 1]
            hits.append(np.linalg.norm(sample - centre) <= radius)
        inside += any(hits)
    return inside / len(predictions)


@pytest.mark.parametrize("num_neighbours", [1, 3])
def test_precision_and_recall_are_those_of_a_slow_count(extractor, num_neighbours):
    first, second = feature_pairs(7, 40, 30, 3)
    metric = PrecisionRecall(extractor, num_neighbours=num_neighbours)
    metric.add_features(predictions=torch.from_numpy(first[:25]))
    metric.add_features(predictions=torch.from_numpy(first[25:]), references=torch.from_numpy(second))
    result = metric.compute()
    precision, recall = slow_precision(first, second, num_neighbours), slow_precision(second, first, num_neighbours)
    assert result["precision-EffLite0"] == pytest.approx(precision) and 0 < precision < 1
    assert result["recall-EffLite0"] == pytest.approx(recall) and 0 < recall < 1


def test_sets_apart_have_no_precision_and_equal_ones_all_also_with_copies(extractor):
    metric = PrecisionRecall(extractor)
    features = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).repeat(5, 1)  # radius 0
    for other, expected in ((features + 100, 0), (features.flip(0), 1)):
        metric.add_features(predictions=features, references=other)
        result = metric.compute()
        assert result["precision-EffLite0"] == result["recall-EffLite0"] == expected


# Inception score


def test_inception_score_is_that_of_scipy(extractor, images):
    probabilities = scipy.special.softmax(extractor.logits(images[0].float() / 255).double().numpy(), axis=1)
    divergences = scipy.stats.entropy(probabilities, probabilities.mean(0), axis=1)
    result = InceptionScore(extractor).compute(predictions=images[0])
    assert result["IS-EffLite0"] == pytest.approx(np.exp(divergences.mean()), rel=TOLERANCE)
    metric = InceptionScore(extractor)
    for logits, expected in ((torch.zeros(4, 10), 1), (1000 * torch.eye(10), 10)):  # to the number of classes
        metric.add_logits(logits)
        assert metric.compute()["IS-EffLite0"] == pytest.approx(expected)


# Codes


def slow_uses(codes, grain_map, num_granularities):
    """The codes of one image in a list, region by region."""
    side = 2 ** (num_granularities - 1)
    uses = []
    for row, regions in enumerate(grain_map.tolist()):
        for column, granularity in enumerate(regions):
            region = codes[row * side : (row + 1) * side, column * side : (column + 1) * side]
            step = side // 2**granularity
            uses += region[::step, ::step].flatten().tolist()
    return uses


@pytest.mark.parametrize("num_granularities", [1, 2, 3])
def test_every_code_counts_once(num_granularities):
    generator = torch.Generator().manual_seed(num_granularities)
    grain_maps = torch.randint(num_granularities, (5, 3, 2), generator=generator)
    side = 2 ** (num_granularities - 1)
    codes = torch.randint(50, (5, 3 * side, 2 * side), generator=generator)
    metric = CodeStatistics(64, num_granularities)
    metric.add_batch(codes=codes[:2], grain_maps=grain_maps[:2])
    result = metric.compute(codes=codes[2:], grain_maps=grain_maps[2:])
    uses = [use for image in zip(codes, grain_maps) for use in slow_uses(*image, num_granularities)]
    counts = np.bincount(uses, minlength=64)
    assert result["codes"] == pytest.approx(len(uses) / 5)
    assert result["bits"] == pytest.approx(6 * len(uses) / 5 + 6 * math.log2(num_granularities))
    assert result["codebook usage"] == pytest.approx((counts > 0).mean())
    assert result["perplexity"] == pytest.approx(np.exp(scipy.stats.entropy(counts)))
    with pytest.raises(ValueError, match=rf"codes must have shape \(5, {3 * side}, {2 * side}\), got \(5, 1, 1\)"):
        metric.add_batch(codes=codes[:, :1, :1], grain_maps=grain_maps)
    with pytest.raises(ValueError, match="given together"):
        metric.add_batch(codes=codes)


# All of them


def test_evaluate_loads_and_combines_every_metric_from_its_file(extractor, images):
    arguments, all_loaded = dict(predictions=images[0], references=images[1]), []
    for metric in all_metrics(extractor):
        options = {"extractor": extractor} if hasattr(metric, "extractor") else {}
        options |= {"network": "efficientnet-lite0"} if hasattr(metric, "network") else {}
        file = type(metric).__module__.rpartition(".")[2]
        loaded = evaluate.load(str(FOLDER / f"{file}.py"), **options)
        assert loaded and isinstance(loaded, evaluate.Metric) and type(loaded).__name__ == type(metric).__name__
        inputs = inputs_of(metric, **arguments)
        assert loaded.compute(**inputs) == metric.compute(**inputs)
        all_loaded += [loaded] if isinstance(metric, (PSNR, SSIM, FrechetDistance)) else []
    together = evaluate.combine(all_loaded)
    together.add_batch(**arguments)
    result = together.compute()
    assert result["PSNR"] == PSNR().compute(**arguments)["PSNR"] and {"SSIM", "FD-EffLite0", "extractor"} <= set(
        result
    )
    mixed = evaluate.combine([PSNR(), InceptionScore(extractor=extractor)]).compute(**arguments)
    assert mixed["PSNR"] == result["PSNR"] and mixed.keys() > {"PSNR", "extractor"}
    with pytest.raises(ValueError, match="num_process must be 1, got 2"):
        evaluate.load(str(FOLDER / "psnr.py"), num_process=2, process_id=0, experiment_id="x")
    loaded = evaluate.load(str(FOLDER / "code_statistics.py"), codebook_size=4, num_granularities=1)
    grid = torch.tensor([[[0, 1], [2, 3]]])
    result = loaded.compute(codes=grid, grain_maps=grid * 0)
    assert result["perplexity"] == pytest.approx(4) and result["bits"] == 8


def test_batches_change_nothing_and_compute_starts_anew_and_memory_does_not_grow(extractor, images):
    for metric in all_metrics(extractor):
        whole = metric.compute(**inputs_of(metric, *images))
        for rows in (slice(0, 1), slice(1, 6)):
            metric.add_batch(**inputs_of(metric, images[0][rows], images[1][rows]))
        assert_close(metric.compute(), whole)
        with pytest.raises(ValueError, match="at least"):
            metric.compute()
        sizes = []
        for _ in range(2):
            metric.add_batch(**inputs_of(metric, *images))
            sizes.append(len(pickle.dumps(metric.state)))
        grows = isinstance(metric, PrecisionRecall)  # needs all features
        assert (sizes[1] > sizes[0] + 1000) == grows and abs(sizes[1] - sizes[0]) < (20_000 if grows else 20)


def test_a_batch_that_is_refused_counts_for_nothing(extractor, images):
    predictions, references = images
    for metric in (FrechetDistance(extractor), PrecisionRecall(extractor)):
        with pytest.raises(ValueError, match=r"lie in \[-1, 1\]"):
            metric.add_batch(predictions=predictions, references=references.float())
        metric.add_batch(predictions=predictions, references=references)
        figures = metric.compute()
        assert figures["num_predictions"] == figures["num_references"] == 6


def test_too_few_images_are_kept_for_more(extractor, images):
    predictions, references = images
    metric, whole = PrecisionRecall(extractor), PrecisionRecall(extractor)
    metric.add_batch(predictions=predictions[:3], references=references)
    with pytest.raises(ValueError, match="at least 4 predictions, got 3"):
        metric.compute()
    metric.add_batch(predictions=predictions[3:])
    assert metric.compute() == whole.compute(predictions=predictions, references=references)


@pytest.mark.filterwarnings("error")
def test_arrays_that_may_not_be_written_to_are_taken(images):
    arrays = [image.numpy() for image in images]
    for array in arrays:
        array.setflags(write=False)
    assert PSNR().compute(predictions=arrays[0], references=arrays[1]) == PSNR().compute(
        predictions=images[0], references=images[1]
    )


def test_what_is_no_image_is_refused(images):
    metric, (predictions, references) = PSNR(), images
    for wrong, error, message in (
        (predictions.float(), ValueError, r"lie in \[-1, 1\], got 0 ... 255; clamp"),
        (torch.full((6, 3, 32, 40), math.nan), ValueError, "finite"),
        (predictions.long(), TypeError, "float in .* or uint8, got torch.int64"),
        (predictions[0], ValueError, r"shape \(B, 3, H, W\), got \(3, 32, 40\)"),
        (predictions[:0], ValueError, r"shape \(B, 3, H, W\), got \(0, 3"),
        (predictions[:5], ValueError, "one shape"),
        ("image.png", TypeError, "tensor or array"),
        (None, ValueError, "given together"),
    ):
        with pytest.raises(error, match=message):
            metric.add_batch(predictions=wrong, references=references)
    with pytest.raises(TypeError, match="no input labels; it has predictions, references"):
        metric.add_batch(labels=predictions)
    with pytest.raises(TypeError, match="use add_batch"):
        metric.add(prediction=predictions[0], reference=references[0])


def measure_own_images(rank, extractor, images):
    """The results of a process's own images, and what it says when it pretends to another extractor."""
    rows = [slice(0, 4), slice(4, 6)][rank]
    results = []
    for metric in all_metrics(extractor):
        metric.add_batch(**inputs_of(metric, images[0][rows], images[1][rows]))
        results.append(metric.compute())
    metric = PrecisionRecall(extractor, num_neighbours=1 + rank)
    metric.add_batch(predictions=images[0], references=images[1])
    with pytest.raises(ValueError) as error:
        metric.compute()
    return [*results, str(error.value)]


def test_two_processes_give_the_figures_of_one(tmp_path, extractor, images):
    first, second = in_two_processes(tmp_path, measure_own_images, extractor, images)
    assert first == second
    for metric, result in zip(all_metrics(extractor), first):
        assert_close(result, metric.compute(**inputs_of(metric, *images)))
    assert "all processes must measure with the same" in first[-1] and "'num_neighbours': 2" in first[-1]
