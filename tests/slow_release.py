"""The release's files in tests: its reference values, other configurations, and its DQ-VAE in plain functions."""

import json
import math
import re
from pathlib import Path

import torch
import yaml
from torch.nn import functional as F

REFERENCE = Path(__file__).parent / "fixtures" / "reference"
VAES = ["dual_entropy", "dual_feature", "triple_feature"]
TRANSFORMERS = ["transformer_uncond", "transformer_class"]


def reference_paths(name):
    return REFERENCE / name / "config.yml", REFERENCE / name / "model.ckpt"


def load_config(name):
    return yaml.safe_load((REFERENCE / name / "config.yml").read_text())


def load_state(name):
    return torch.load(REFERENCE / name / "model.ckpt", weights_only=True)["state_dict"]


def load_table():
    return json.loads((REFERENCE / "dual_entropy" / "entropy_thresholds.json").read_text())


def params(config, *keys):
    """The parameters of a section of a release configuration, as they stand in it (not a copy)."""
    section = config["model"]
    for key in keys:
        section = section["params"][key]
    return section["params"]


def changed(name, changes):
    """A reference configuration with other parameters, {"encoderconfig.router_config.gate_type": value}; ... is absent."""
    config = load_config(name)
    for path, value in changes.items():
        *sections, key = path.split(".")
        if value is ...:
            del params(config, *sections)[key]
        else:
            params(config, *sections)[key] = value
    return config


def write(folder, config, state_dict=None):
    """Configuration and checkpoint in the release's format, with the entropy table where it expects it; both paths."""
    for place in (folder, folder.parent / "dual_entropy"):
        place.mkdir(parents=True, exist_ok=True)
        (place / "entropy_thresholds.json").write_text(json.dumps(load_table()))
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    if state_dict is not None:
        torch.save({"state_dict": state_dict, "epoch": 1}, folder / "model.ckpt")
    return folder / "config.yml", folder / "model.ckpt"


def vae_size(resolution, fine_factor=2):
    """Everything in a DQ-VAE's configuration that follows from the size of its images."""
    return {
        "encoderconfig.resolution": resolution,
        "decoderconfig.resolution": resolution,
        "decoderconfig.latent_size": resolution // fine_factor,
    }


def budget_size(*sides):
    """The sides of the grids in a DQ-VAE's budget, coarsest first."""
    names = ["min", "median", "max"] if len(sides) == 3 else ["min", "max"]
    return {f"lossconfig.budget_loss_config.{name}_grain_size": side for name, side in zip(names, sides)}


def transformer_size(num_codes, coarse_side, num_classes):
    """Everything in a DQ-Transformer's configuration that follows from its sizes."""
    starts = max(num_classes, 1)
    stage = "class_cond_stage_config" if num_classes else "uncond_stage_config"
    changes = {
        "transformer_config.vocab_size": num_codes + 2 + starts,
        "transformer_config.content_pad_code": num_codes,
        "permuter_config.content_pad_code": num_codes,
        "permuter_config.content_eos_code": num_codes + 1,
    }
    if num_classes:
        changes |= {f"{stage}.n_classes": num_classes, f"{stage}.threshold_content": num_codes + 2}
    for word, side in (("coarse", coarse_side), ("fine", 2 * coarse_side)):
        changes |= {
            f"transformer_config.{word}_position_size": side**2 + 2 + starts,
            f"transformer_config.{word}_position_pad_code": side**2,
            f"permuter_config.{word}_hw": side,
            f"permuter_config.{word}_position_pad_code": side**2,
            f"permuter_config.{word}_position_eos_code": side**2 + 1,
        }
        if num_classes:
            changes[f"{stage}.threshold_{word}_position"] = side**2 + 2
        else:
            changes |= {f"{stage}.{word}_sos": num_codes + 2, f"{stage}.{word}_pos_sos": side**2 + 2}
    return changes


def draw_transformer(config, seed=0):
    """Tensors of a DQ-Transformer of a configuration, drawn; without those of its first stage."""
    stack = params(config, "transformer_config")
    width = stack["n_embd"]
    shapes = {
        "content_emb.weight": (stack["vocab_size"], width),
        "content_coarse_pos_emb.weight": (stack["coarse_position_size"], width),
        "content_fine_pos_emb.weight": (stack["fine_position_size"], width),
        "seg_emb.weight": (2, width),
        "pos_emb": (1, stack["block_size"], width),
    }
    for name, vocabulary in (("position", stack["fine_position_size"]), ("content", stack["vocab_size"])):
        shapes |= {f"{name}_head.0.{kind}": (width,) for kind in ("weight", "bias")}
        shapes[f"{name}_head.1.weight"] = (vocabulary, width)
        for layer in range(stack[f"{name}_layer"]):
            key = f"{name}_transformer.{layer}"
            for part in ("query", "key", "value", "proj"):
                shapes |= {f"{key}.attn.{part}.weight": (width, width), f"{key}.attn.{part}.bias": (width,)}
            shapes |= {f"{key}.{norm}.{kind}": (width,) for norm in ("ln1", "ln2") for kind in ("weight", "bias")}
            shapes |= {f"{key}.mlp.0.weight": (4 * width, width), f"{key}.mlp.0.bias": (4 * width,)}
            shapes |= {f"{key}.mlp.2.weight": (width, 4 * width), f"{key}.mlp.2.bias": (width,)}
    generator = torch.Generator().manual_seed(seed)
    return {f"transformer.{key}": torch.randn(shape, generator=generator) for key, shape in shapes.items()}


class Release:
    """The release's model in plain functions; without `state` tensors are drawn, so any option has a checkpoint."""

    def __init__(self, config, state=None, seed=0):
        self.config = config["model"]["params"]
        self.state = {} if state is None else dict(state)
        self.drawn = state is None
        self.used = set()
        self.generator = torch.Generator().manual_seed(seed)
        self.prefix = ""
        self.vae = self.config
        if "first_stage_config" in self.config:
            self.prefix, self.vae = "first_stage_model.", self.config["first_stage_config"]["params"]
        self.encoder, self.decoder = self.vae["encoderconfig"]["params"], self.vae["decoderconfig"]["params"]
        self.router = self.encoder["router_config"]["params"]
        triple = "Triple" in self.vae["encoderconfig"]["target"]
        self.words = ["coarse", "median", "fine"] if triple else ["coarse", "fine"]
        self.num_codes, self.width = (self.vae["vqconfig"]["params"][key] for key in ("codebook_size", "codebook_dim"))

    def tensor(self, key, *shape):
        if self.drawn and key not in self.state:
            scale = 0.1 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5
            mean = 1.0 if re.search(r"(norm\w*|ln\d|_head\.0)\.weight$", key) else 0.0
            self.state[key] = mean + scale * torch.randn(shape, generator=self.generator)
        self.used.add(key)
        assert self.state[key].shape == shape, key
        return self.state[key]

    def conv(self, key, x, width, size=3, **options):
        key = self.prefix + key
        weight = self.tensor(f"{key}.weight", width, x.shape[1], size, size)
        return F.conv2d(x, weight, self.tensor(f"{key}.bias", width), **options)

    def group_norm(self, key, x, groups=32):
        weight, bias = (self.tensor(f"{self.prefix}{key}.{name}", x.shape[1]) for name in ("weight", "bias"))
        return F.group_norm(x, groups, weight, bias, eps=1e-6)

    def linear(self, key, x, width):
        return F.linear(x, self.tensor(f"{key}.weight", width, x.shape[-1]), self.tensor(f"{key}.bias", width))

    def residual(self, key, x, width):
        hidden = self.conv(f"{key}.conv1", F.silu(self.group_norm(f"{key}.norm1", x)), width, padding=1)
        hidden = self.conv(f"{key}.conv2", F.silu(self.group_norm(f"{key}.norm2", hidden)), width, padding=1)
        return hidden + (x if x.shape[1] == width else self.conv(f"{key}.nin_shortcut", x, width, size=1))

    def attention(self, key, x):
        width, normed = x.shape[1], self.group_norm(f"{key}.norm", x)
        q, k, v = (self.conv(f"{key}.{name}", normed, width, size=1).flatten(2) for name in "qkv")
        weights = (q.transpose(1, 2) @ k * width**-0.5).softmax(-1)  # (B, cells, cells)
        return x + self.conv(f"{key}.proj_out", (v @ weights.transpose(1, 2)).view_as(x), width, size=1)

    def middle(self, key, x):
        x = self.residual(f"{key}.block_1", x, x.shape[1])
        return self.residual(f"{key}.block_2", self.attention(f"{key}.attn_1", x), x.shape[1])

    def level(self, key, x, width, num_blocks, attention_resolutions):
        for block in range(num_blocks):
            x = self.residual(f"{key}.block.{block}", x, width)
            if x.shape[-1] in attention_resolutions:
                x = self.attention(f"{key}.attn.{block}", x)
        return x

    def features(self, image):
        """Each granularity's features, coarsest first."""
        options = self.encoder
        x, levels = self.conv("encoder.conv_in", image, options["ch"], padding=1), []
        for level, multiplier in enumerate(options["ch_mult"]):
            if level:
                x = self.conv(
                    f"encoder.down.{level - 1}.downsample.conv", F.pad(x, (0, 1, 0, 1)), x.shape[1], stride=2
                )
            key, width = f"encoder.down.{level}", options["ch"] * multiplier
            x = self.level(key, x, width, options["num_res_blocks"], options["attn_resolutions"])
            levels.append(x)
        heads = []
        for word, x in zip(self.words, reversed(levels)):
            x = F.silu(self.group_norm(f"encoder.norm_out_{word}", self.middle(f"encoder.mid_{word}", x)))
            heads.append(self.conv(f"encoder.conv_out_{word}", x, options["z_channels"], padding=1))
        return heads

    def route(self, image, features):
        """Router logits or entropies, and the grain map."""
        if "json_path" in self.router:
            threshold = load_table()[str(round(100 - 100 * self.router["fine_grain_ratito"]))]
            entropy = torch.stack([self.entropies(picture) for picture in image])
            return entropy, (entropy > threshold).long()
        pooled = []
        for granularity, (word, x) in enumerate(zip(self.words, features)):
            if self.router["normalization_type"] != "none":
                groups = int(self.router["normalization_type"].removeprefix("group-"))
                x = self.group_norm(f"encoder.router.feature_norm_{word}", x, groups)
            pooled.append(F.avg_pool2d(x, 2**granularity))
        x = torch.cat(pooled, 1).permute(0, 2, 3, 1)
        key = f"{self.prefix}encoder.router.gate"
        if self.router["gate_type"] == "1layer-fc":
            logits = self.linear(key, x, len(self.words))
        else:
            activation = F.relu if self.router["gate_type"].endswith("ReLu") else F.silu
            x = activation(self.linear(f"{key}.0", x, x.shape[-1]))
            logits = self.linear(f"{key}.2", x, len(self.words))
        return logits.permute(0, 3, 1, 2), logits.argmax(-1)

    def entropies(self, picture):
        """Entropy in nats of each patch of one picture."""
        side = self.vae.get("entropy_patch_size", 16)
        grey = 0.2989 * picture[0] + 0.5870 * picture[1] + 0.1140 * picture[2]
        patches = grey.unfold(0, side, side).unfold(1, side, side)
        bins = torch.linspace(-1, 1, 32)
        density = (-(((patches.flatten(2)[..., None] - bins) / 0.01) ** 2) / 2).exp().mean(2)
        density = density / (density.sum(-1, keepdim=True) + 1e-40) + 1e-40
        return -(density * density.log()).sum(-1)

    def encode(self, image):
        """Routed features, router output, grain map, codes, VQ loss."""
        features = self.features(image)
        routing, grain_map = self.route(image, features)
        hidden, weights = features[-1].clone(), torch.ones_like(features[-1][:, :1])
        side = 2 ** (len(features) - 1)
        for b, row, column in (grain_map < side).nonzero().tolist():
            granularity = int(grain_map[b, row, column])
            cells = (b, slice(None), slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side))
            repeats = 2 ** (len(features) - 1 - granularity)
            hidden[cells] = F.interpolate(features[granularity][b : b + 1], scale_factor=repeats)[0][cells[1:]]
            weights[cells] = 1 / repeats**2
        z = self.conv("quant_conv", hidden, self.width, size=1)
        codebook = self.tensor(f"{self.prefix}quantize.codebook.weight", self.num_codes + 1, self.width)[:-1]
        self.tensor(f"{self.prefix}quantize.codebook.cluster_size_ema", self.num_codes)
        self.tensor(f"{self.prefix}quantize.codebook.embed_ema", self.num_codes, self.width)
        codes = torch.cdist(z.permute(0, 2, 3, 1).flatten(0, 2), codebook).argmin(1).view(-1, *z.shape[2:])
        quantized = codebook[codes].permute(0, 3, 1, 2)
        beta = self.vae["vqconfig"]["params"]["commitment_beta"]
        return hidden, routing, grain_map, codes, (1 + beta) * ((quantized - z) ** 2 * weights).mean()

    def decode(self, codes):
        options = self.decoder
        codebook = self.tensor(f"{self.prefix}quantize.codebook.weight", self.num_codes + 1, self.width)
        width, size = options["in_ch"], codes.shape[-1]
        x = self.conv("post_quant_conv", codebook[codes].permute(0, 3, 1, 2), width, size=1)
        coordinate = torch.linspace(-1, 1, size)
        if "fourier" in options["position_type"]:
            grid = torch.stack([coordinate.expand(size, size), coordinate[:, None].expand(size, size)])
            x = x + self.conv("decoder.position_bias_fourier.lff.ffm.conv", grid[None], width, size=1).sin()
        if "learned" in options["position_type"]:
            key = f"{self.prefix}decoder.position_bias_learned"
            rows, columns = (self.tensor(f"{key}.{name}_embed.weight", size, width) for name in ("row", "col"))
            x = x + (rows[:, None] + columns[None]).permute(2, 0, 1)
        x = self.conv("decoder.conv_in", x, options["ch"] * options["ch_mult"][-1], padding=1)
        x = self.middle("decoder.mid", x)
        for level in reversed(range(len(options["ch_mult"]))):
            key, width = f"decoder.up.{level}", options["ch"] * options["ch_mult"][level]
            x = self.level(key, x, width, options["num_res_blocks"] + 1, options["attn_resolutions"])
            if level:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(f"{key}.upsample.conv", x, width, padding=1)
        return self.conv("decoder.conv_out", F.silu(self.group_norm("decoder.norm_out", x)), 3, padding=1)
