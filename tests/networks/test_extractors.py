"""The networks behind the figures: what they compute, and that no other passes for them."""

import numpy as np
import pytest
import skimage.data
import torch

from dq_hf.networks.extractors import INCEPTION_FILE, EfficientNetLite0Extractor, InceptionV3Extractor, make_extractor
from dq_hf.networks.inception import InceptionV3


@pytest.fixture(scope="module")
def extractor():
    return EfficientNetLite0Extractor()


def random_weights(shapes):
    """The same for everyone: drawn by numpy in the order of the names, in scales that keep signals alive."""
    rng, weights = np.random.default_rng(0), {}
    for name, shape in sorted(shapes.items()):
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
            continue
        values = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith(("conv.weight", "fc.weight")):
            values *= np.sqrt(2 / np.prod(shape[1:]), dtype=np.float32)
        elif name.endswith(("running_var", "bn.weight")):
            values = 1 + 0.2 * np.tanh(values)
        else:
            values *= 0.1
        weights[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return weights


@torch.no_grad()
def test_inception_is_that_of_torch_fidelity():
    """Expected: torch-fidelity 0.4.0 with these weights, its features "2048" and "logits_unbiased"."""
    with torch.device("meta"):
        network = InceptionV3()
    weights = random_weights({name: tuple(weight.shape) for name, weight in network.state_dict().items()})
    network.load_state_dict(weights, assign=True)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 40, 56), dtype=np.uint8)
    features, logits = network.eval()(torch.from_numpy(pixels).float() / 255)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    expected = [0.0, 3.1353445053100586, 0.0003240796213503927, 0.08545109629631042, 0.03174642473459244]
    np.testing.assert_allclose(features[0, :5], expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        features[1, -3:], [1.8929576873779297, 0.4568878710269928, 0.46975815296173096], rtol=1e-3
    )
    assert features.double().sum().item() == pytest.approx(2388.319390072422, rel=1e-4)
    expected = [0.009798526763916016, 0.9082576036453247, 0.9668823480606079, -2.33697509765625]
    np.testing.assert_allclose(logits[0, :4], expected, rtol=1e-3, atol=1e-4)


def test_missing_inception_weights_and_those_of_another_network_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "hub" / "checkpoints" / INCEPTION_FILE
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        OSError, match=rf"(?s)offline mode.*fetch https://\S*/{INCEPTION_FILE}.*efficientnet-lite0"
    ) as error:
        make_extractor("inception-v3")
    assert str(file) in str(error.value)
    file.parent.mkdir(parents=True)
    torch.save({"fc.bias": torch.zeros(1008)}, file)
    with pytest.raises(OSError, match="SHA-256 must begin with 6726825d, got .*; fetch it again"):
        InceptionV3Extractor(file)
    with pytest.raises(OSError, match="SHA-256 must begin with 6726825d"):
        make_extractor("inception-v3")
    with pytest.raises(OSError, match="No such file"):
        InceptionV3Extractor(tmp_path / "nothing.pth")


def test_efficientnet_features_are_the_mean_of_block_10_in_either_mode(extractor):
    images = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    seen = []
    handle = extractor.network._blocks[10].register_forward_hook(lambda module, inputs, output: seen.append(output))
    extractor.network((images * 255 - 127) / 128)
    handle.remove()
    features, logits = extractor.features(images), extractor.logits(images)
    assert features.shape == (2, 112) and not features.requires_grad
    torch.testing.assert_close(features, seen[0].mean(dim=(2, 3)), rtol=1e-3, atol=1e-4)
    assert torch.equal(extractor.train().features(images), features) and torch.equal(extractor.logits(images), logits)
    extractor.eval()
    cat = torch.from_numpy(skimage.data.chelsea()[:, 75:375]).permute(2, 0, 1)[None].float() / 255
    assert int(extractor.logits(cat).argmax()) in range(281, 286)  # ImageNet's domestic cats


def test_extractors_have_different_names_and_are_made_by_name(extractor):
    assert make_extractor(extractor) is extractor
    assert make_extractor("efficientnet-lite0").description == extractor.description
    names = {(kind.frechet_distance_name, kind.suffix) for kind in (EfficientNetLite0Extractor, InceptionV3Extractor)}
    assert names == {("FD-EffLite0", "EffLite0"), ("FID", "InceptionV3")}
    with pytest.raises(ValueError, match="auto or one of inception-v3, efficientnet-lite0, got 'vgg'"):
        make_extractor("vgg")
