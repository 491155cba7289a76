"""Feature extractors: whose features a Fréchet distance compares decides what the figure means, so it has a name."""

import hashlib
import logging
import pickle
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import is_offline_mode
from torch import nn

from ..data.fingerprint import hash_weights
from .inception import InceptionV3
from .perceptual import EfficientNetLitePerceptualLoss, efficientnet_inputs, load_efficientnet_lite0

logger = logging.getLogger(__name__)

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # ends, as torch.hub's files do, with its SHA-256
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"


class FeatureExtractor(nn.Module):
    """A frozen network that describes images; `train()` changes nothing.

    Attributes:
        description: network, features, resampling and a hash of the weights. Features of extractors with different
            descriptions have nothing in common.
        frechet_distance_name, inception_score_name, suffix: what figures by these features are called.
    """

    frechet_distance_name = inception_score_name = suffix = None

    def freeze(self, description):
        """End a subclass's constructor."""
        self.description = description
        self.requires_grad_(False)
        self.eval()

    def train(self, mode=True):
        """Nothing: batch norms and dropout stay as in evaluation."""
        return super().train(False)

    def features(self, images):
        """Features (B, D) of images (B, 3, H, W), float32 in [0, 1]."""
        raise NotImplementedError

    def logits(self, images):
        """Logits (B, classes) of images (B, 3, H, W), float32 in [0, 1]."""
        raise NotImplementedError

    def features_and_logits(self, images):
        """Both."""
        return self.features(images), self.logits(images)


class InceptionV3Extractor(FeatureExtractor):
    """InceptionV3 in the version of the Fréchet inception distance: 2048 pooled features, 1008 classes.

    Its figures are FID and inception score if the images are those that others take: this checks the weights, and
    resamples to 299x299 as the original graph does.

    Args:
        weights: path of `pt_inception-2015-12-05-6726825d.pth`; None takes it from the cache of torch.hub, into which it
            is downloaded (96 MB) the first time.

    Raises:
        OSError: the file is not there, damaged, or another one; or cannot be downloaded.
    """

    frechet_distance_name, inception_score_name, suffix = "FID", "IS", "InceptionV3"

    def __init__(self, weights=None):
        super().__init__()
        state = read_inception_weights(weights)
        with torch.device("meta"):
            self.network = InceptionV3()
        self.network.load_state_dict(state, assign=True)
        self.freeze("InceptionV3 (FID, 2015-12-05), 2048 pooled features, bilinear to 299x299, weights 6726825d")

    def features(self, images):
        return self.network(images)[0]

    def logits(self, images):
        return self.network(images)[1]

    def features_and_logits(self, images):
        return self.network(images)


def read_inception_weights(path):
    """Tensors of the file; see `InceptionV3Extractor`."""
    if path is None:
        path = Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
        if not path.exists():
            remedy = (
                f"fetch {INCEPTION_URL} and put it at {path}, or pass the path of a copy; or use the extractor "
                "efficientnet-lite0, whose figures are no FID"
            )
            if is_offline_mode():
                raise OSError(f"the weights of InceptionV3 are not there, and this is offline mode; {remedy}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(INCEPTION_URL, str(path), "6726825d", progress=sys.stderr.isatty())
            except (OSError, RuntimeError) as error:
                raise OSError(f"the weights of InceptionV3 could not be downloaded ({error}); {remedy}") from error
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if not sha256.startswith("6726825d"):
            raise OSError(f"SHA-256 must begin with 6726825d, got {sha256[:8]}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise OSError(f"{path} is not {INCEPTION_FILE} of {INCEPTION_URL}, whole: {error}; fetch it again") from error


class EfficientNetLite0Extractor(FeatureExtractor):
    """EfficientNet-Lite0, whose ImageNet weights install as a package: 112 features of block 10, 1000 classes.

    Features are those of the images at their own size; classes those of the images at 224x224. Figures are called
    FD-EffLite0 and IS-EffLite0: they are neither FID nor inception score, and cannot be compared with them.

    Raises `ImportError` when the packages of the extra `metrics` are missing.
    """

    frechet_distance_name, inception_score_name, suffix = "FD-EffLite0", "IS-EffLite0", "EffLite0"
    input_side = 224  # that the network was trained with

    def __init__(self):
        super().__init__()
        self.network = load_efficientnet_lite0()
        self.maps = EfficientNetLitePerceptualLoss()  # the same blocks, faster
        self.freeze(
            f"EfficientNet-Lite0, block 10 mean-pooled, 112 features, weights {hash_weights(self.network.state_dict())}"
        )

    def features(self, images):
        return self.maps.feature_maps(images * 2 - 1)[-1].mean(dim=(2, 3))

    def logits(self, images):
        images = F.interpolate(images, [self.input_side] * 2, mode="bilinear", antialias=True)
        return self.network(efficientnet_inputs(images * 2 - 1))


EXTRACTORS = {"inception-v3": InceptionV3Extractor, "efficientnet-lite0": EfficientNetLite0Extractor}


def make_extractor(name):
    """The extractor of this name; an extractor is given back as it is.

    Args:
        name: "inception-v3", "efficientnet-lite0", or "auto": the first whose weights are available.

    Raises:
        ValueError: another name.
        ImportError, OSError: its weights are not installed or cannot be downloaded.
    """
    return name if isinstance(name, FeatureExtractor) else make_first(name, EXTRACTORS, "extractor")


def make_first(name, makers, kind):
    """What the maker of this name gives; for "auto" the first that can, with a word in the log about the others.

    Raises:
        ValueError: another name.
        ImportError, OSError: whatever it needs is missing.
    """
    if name not in makers and name != "auto":
        raise ValueError(f"{kind} must be auto or one of {', '.join(makers)}, got {name!r}")
    *attempts, last = makers if name == "auto" else [name]
    for attempt in attempts:
        try:
            return makers[attempt]()
        except (ImportError, OSError) as error:
            logger.warning("%s %s cannot be had, taking the next: %s", kind, attempt, error)
    return makers[last]()
