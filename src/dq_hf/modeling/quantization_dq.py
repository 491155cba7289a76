"""Vector quantisation with a codebook that moves by exponential averages (van den Oord et al. 2017)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from transformers import initialization as init
from transformers.utils import ModelOutput

from .modeling_utils_dq import ExactBuffers


@dataclass
class DQQuantizerOutput(ModelOutput):
    """What `DQQuantizer` gives.

    Args:
        quantized: (B, D, H, W), the code vectors, with the gradient of the input (straight-through).
        codes: (B, H, W) long.
        loss: scalar, VQ loss.
    """

    quantized: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    loss: torch.Tensor | None = None


class DQQuantizer(ExactBuffers):
    """Nearest code by squared L2, and its codebook's learning. Arithmetic is float32 whatever the autocast dtype.

    The codebook never receives a gradient. In training mode each call moves it, after the look-up, unless `frozen`;
    counts and sums are first added up over the processes, so that all keep the same codebook. It stays float32 when
    the model is cast to another dtype.
    """

    def __init__(self, config):
        super().__init__()
        self.num_codes = config.codebook_size
        self.decay = config.codebook_decay
        self.eps = config.codebook_eps
        self.beta = config.commitment_beta
        self.restart_dead_codes = config.restart_dead_codes
        self.frozen = False
        codebook = torch.randn(config.codebook_size, config.codebook_dim, dtype=torch.float32)
        self.register_buffer("codebook", codebook)
        self.register_buffer("cluster_size", torch.ones(config.codebook_size, dtype=torch.float32))
        self.register_buffer("embed_sum", codebook.clone())
        self._is_hf_initialized = not codebook.is_meta  # transformers then leaves it as it is

    def reset_parameters(self):
        """Codes from a normal distribution, each used once so far."""
        init.normal_(self.codebook)
        init.ones_(self.cluster_size)
        init.copy_(self.embed_sum, self.codebook)

    def forward(self, features, cell_weights, top_left, learn=True):
        """Quantise features.

        Args:
            features: (B, D, H, W) float, after `quant_conv`.
            cell_weights: (B, 1, H, W) float, weight of each cell in the loss (method: 4^-(K-1-g)).
            top_left: (B, H, W) long, raster index of the first cell of each cell's code. A coarse code is looked up
                once, there, so that rounding cannot split it.
            learn: False keeps the codebook where it is, as in evaluation mode.
        """
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            vectors = features.permute(0, 2, 3, 1).flatten(0, 2)  # (B*H*W, D)
            codes = self.nearest(vectors).view(top_left.shape).flatten(1)
            codes = codes.gather(1, top_left.flatten(1)).view(top_left.shape)
            quantized = self.lookup(codes)
            commitment = (quantized.detach() - features).square()
            codebook_term = (quantized - features.detach()).square()
            loss = self.beta * (commitment * cell_weights).mean() + (codebook_term * cell_weights).mean()
            if learn and self.training and not self.frozen:
                self.update(vectors.detach(), codes.flatten())
            quantized = features + (quantized - features).detach()
        return DQQuantizerOutput(quantized=quantized, codes=codes, loss=loss)

    def nearest(self, vectors):
        """Index of the nearest code, (M,) long, for vectors (M, D)."""
        codebook = self.codebook.float()
        distances = torch.addmm(codebook.square().sum(1), vectors, codebook.t(), alpha=-2)  # without ||z||^2
        return distances.argmin(1)

    def lookup(self, codes):
        """Code vectors (B, D, H, W) float32 of codes (B, H, W) long."""
        return nn.functional.embedding(codes, self.codebook.float()).permute(0, 3, 1, 2)

    @torch.no_grad()
    def update(self, vectors, codes):
        """Move the averages by one step: vectors (M, D) float32 that were given codes (M,).

        Raises:
            TypeError: a codebook in half precision, too coarse for its small steps.
        """
        if self.codebook.dtype != torch.float32:
            raise TypeError(
                f"the codebook learns in float32 only, got {self.codebook.dtype}; keep buffers in float32 (FSDP: "
                "buffer_dtype), or set quantizer.frozen = True"
            )
        counts = torch.bincount(codes, minlength=self.num_codes).to(vectors.dtype)
        sums = torch.zeros_like(self.embed_sum).index_add_(0, codes, vectors)
        distributed = dist.is_available() and dist.is_initialized()
        if distributed:
            dist.all_reduce(counts)
            dist.all_reduce(sums)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.embed_sum.lerp_(sums, 1 - self.decay)
        if self.restart_dead_codes:
            # Drawn for every code, used or not, so that no host synchronisation is needed to count the dead ones.
            fresh = vectors[torch.randint(len(vectors), (self.num_codes,), device=vectors.device)]
            if distributed:
                dist.broadcast(fresh, src=0)
            dead = self.cluster_size < 1
            self.embed_sum.copy_(torch.where(dead[:, None], fresh, self.embed_sum))
            self.cluster_size.copy_(torch.where(dead, 1.0, self.cluster_size))
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) * total / (total + self.num_codes * self.eps)
        self.codebook.copy_(self.embed_sum / smoothed[:, None])
