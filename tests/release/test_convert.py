"""Released checkpoints become our folders: agreement with the release's outputs, other sizes and options, refusals."""

import copy
import datetime
import json
import math
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import full_disk
from safetensors.torch import load_file
from torch.nn import functional as F

from dq_hf.modeling.grain_map_dq import expand_grain_map
from dq_hf.modeling.image_processing_dq import DQImageProcessor
from dq_hf.modeling.modeling_dq import DQForImageGeneration
from dq_hf.modeling.modeling_dqvae import DQVAEModel
from dq_hf.modeling.routing_dq import budget_loss
from dq_hf.release import convert_checkpoint
from dq_hf.release.weights import transformer_state_dict, vae_state_dict

REFERENCE = Path(__file__).parents[1] / "fixtures" / "reference"
VAES = ["dual_entropy", "dual_feature", "triple_feature"]
TRANSFORMERS = ["transformer_uncond", "transformer_class"]
# Agreement that the reference asks for: absolute for tensors, relative for losses and gradients.
ABSOLUTE = {"atol": 1e-4, "rtol": 0}
RELATIVE = {"atol": 1e-7, "rtol": 1e-3}


def load_config(name):
    return yaml.safe_load((REFERENCE / name / "config.yml").read_text())


def load_state(name):
    return torch.load(REFERENCE / name / "model.ckpt", weights_only=True)["state_dict"]


def load_model(folder, name):
    return (DQForImageGeneration if name in TRANSFORMERS else DQVAEModel).from_pretrained(folder).eval()


def params(config, *keys):
    """The parameters of a section of a release configuration, as they stand in it (not a copy)."""
    section = config["model"]
    for key in keys:
        section = section["params"][key]
    return section["params"]


def write(folder, config, state_dict):
    """Configuration and checkpoint in the release's format, with the entropy table where it expects it; both paths."""
    table = (REFERENCE / "dual_entropy" / "entropy_thresholds.json").read_text()
    for place in (folder, folder.parent / "dual_entropy"):
        place.mkdir(parents=True, exist_ok=True)
        (place / "entropy_thresholds.json").write_text(table)
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    torch.save({"state_dict": state_dict, "epoch": 1}, folder / "model.ckpt")
    return folder / "config.yml", folder / "model.ckpt"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Each reference checkpoint's model, converted once and loaded from its folder, by name."""
    models = {}

    def get(name):
        if name not in models:
            folder = tmp_path_factory.mktemp(name)
            convert_checkpoint(REFERENCE / name / "config.yml", REFERENCE / name / "model.ckpt", folder)
            models[name] = load_model(folder, name)
        return copy.deepcopy(models[name])

    return get


@pytest.mark.parametrize("name", VAES)
def test_vae_agrees_with_every_reference_tensor(name, converted):
    expected = load_file(REFERENCE / name / "expected.safetensors")
    model = converted(name)
    with torch.no_grad():
        encoded = model.encode(expected["image"])
        targets, gamma = model.config.budget_targets, model.config.budget_gamma
        if name == "dual_entropy":  # its configuration has no budget section
            targets, gamma = [0.5], 20.0
        fine_grain_map = expand_grain_map(encoded.grain_map, len(model.config.granularities))
        results = {
            "image": expected["image"],
            "entropy": encoded.entropy,
            "gate": encoded.gates if model.config.router == "entropy" else encoded.router_logits,
            "grain_map": encoded.grain_map,
            "hidden": encoded.hidden_states,
            "codebook_mask": model.cell_weights(fine_grain_map),
            "codes": encoded.codes,
            "quantized": encoded.quantized,
            "vq_loss": encoded.loss,
            "reconstruction": model.decode(encoded.quantized).sample,
            "decoded_from_codes": model.decode_codes(encoded.codes).sample,
            "budget_gate": expected["budget_gate"],
            "budget_loss": budget_loss(expected["budget_gate"], targets, gamma),
        }
    for key, value in expected.items():
        if not key.startswith("train."):
            compare(key, results[key], value)


def compare(key, actual, expected):
    tolerances = RELATIVE if "loss" in key or ".grad." in key else ABSOLUTE
    if not expected.is_floating_point():
        tolerances = {"atol": 0, "rtol": 0}
    torch.testing.assert_close(actual, expected, **tolerances, msg=lambda message: f"{key}: {message}")


def test_one_training_step_agrees_with_every_reference_tensor(converted):
    expected = load_file(REFERENCE / "dual_entropy" / "expected.safetensors")
    model = converted("dual_entropy").train()
    output = model(expected["image"])
    (output.reconstruction_loss + output.vq_loss).backward()
    gradients = dict(model.named_parameters())
    results = {
        "train.loss": output.reconstruction_loss + output.vq_loss,
        "train.vq_loss": output.vq_loss,
        "train.codebook_after": model.quantizer.codebook,
        "train.cluster_size_ema_after": model.quantizer.cluster_size,
        "train.embed_ema_after": model.quantizer.embed_sum,
        "train.grad.decoder.conv_out.weight": gradients["decoder.output.conv.weight"].grad,
        "train.grad.decoder.position_bias_learned.row_embed.weight": gradients[
            "decoder.position_embedding.rows.weight"
        ].grad,
        "train.grad.encoder.conv_in.weight": gradients["encoder.conv_in.weight"].grad,
        "train.grad.encoder.conv_out_fine.weight": gradients["encoder.outputs.1.conv.weight"].grad,
        "train.grad.quant_conv.weight": gradients["quant_conv.weight"].grad,
    }
    keys = [key for key in expected if key.startswith("train.")]
    assert set(keys) == set(results)
    for key in keys:
        compare(key, results[key], expected[key])


def parts(contents, positions, length):
    """A contiguous stream's coarse and fine (content, position) without start tokens, ends kept."""
    contents, positions = contents[:length], positions[:length]
    ends = (contents == 33).nonzero().flatten().tolist()  # 32 codes, pad, end
    assert len(ends) == 2 and ends[1] == length - 1
    coarse, fine = slice(1, ends[0] + 1), slice(ends[0] + 2, ends[1] + 1)
    return {
        "coarse_content": contents[coarse],
        "coarse_position": positions[coarse],
        "fine_content": contents[fine],
        "fine_position": positions[fine],
    }


def unpad(key, padded):
    """A part of a reference stream without its padding."""
    pad = {"content": 32, "coarse_position": 16, "fine_position": 64}
    pad = pad["content" if key.endswith("content") else key.rpartition(".")[2]]
    return padded[padded != pad]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_agrees_with_every_reference_tensor(name, converted):
    expected = load_file(REFERENCE / name / "expected.safetensors")
    by_class = name == "transformer_class"
    model = converted(name)
    labels = expected.get("class_labels")
    encoded = model.vae.encode(expected["image"])
    unhandled = set(expected) - {"image", "class_labels"}

    def check(key, actual):
        unhandled.remove(key)
        wanted = expected[key]
        if key.endswith(("_content", "_position")):
            wanted = unpad(key, wanted if wanted.dim() == 1 else wanted[0])
        compare(key, actual, wanted)

    stream = model.transformer.pack(encoded.codes, encoded.grain_map, labels)
    for image in range(2):
        for part, actual in parts(stream.contents[image], stream.positions[image], stream.lengths[image]).items():
            key = f"sequence.{part}"
            unhandled.discard(key)
            compare(f"{key} of image {image}", actual, unpad(key, expected[key][image]))
        with torch.no_grad():
            output = model.transformer(
                encoded.codes[image : image + 1],
                encoded.grain_map[image : image + 1],
                labels[image : image + 1] if by_class else None,
            )
        for field in ("content_loss", "position_loss", "coarse_position_loss", "fine_position_loss"):
            check(f"image{image}.{field}", output[field])
        for field in ("content_logits", "position_logits"):
            check(f"image{image}.{field}", output[field])

    for mode in ("fixed", "free"):
        generated = model.transformer.generate(
            class_labels=1 if by_class else None, do_sample=False, fine_positions=mode
        )
        for part, actual in parts(generated.contents[0], generated.positions[0], int(generated.lengths[0])).items():
            check(f"greedy_{mode}.{part}", actual)
        check(f"greedy_{mode}.code_grid", generated.codes)
        with torch.no_grad():
            check(f"greedy_{mode}.image", model.vae.decode_codes(generated.codes).sample)
    assert not unhandled


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_checkpoint_holds_the_first_stage(name, converted):
    ours, alone = converted(name).vae.state_dict(), converted("dual_entropy").state_dict()
    assert ours.keys() == alone.keys()
    assert all(torch.equal(ours[key], alone[key]) for key in ours)


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
            table = json.loads((REFERENCE / "dual_entropy" / "entropy_thresholds.json").read_text())
            threshold = table[str(round(100 - 100 * self.router["fine_grain_ratito"]))]
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
        side = self.vae["entropy_patch_size"]
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

    # The stack of two transformers: elements are (content, position, granularity).

    def transformer_setup(self):
        self.stack = self.config["transformer_config"]["params"]
        self.order = self.config["permuter_config"]["params"]["fine_position_order"]
        self.sides = [self.config["permuter_config"]["params"][f"{word}_hw"] for word in self.words]

    def training_order(self, granularity):
        side = self.sides[granularity]
        cells = [(row, column) for row in range(side) for column in range(side)]
        if self.order == "region-first" and granularity:
            cells.sort(key=lambda cell: (cell[0] // 2, cell[1] // 2))
        return cells

    def start(self, granularity, label):
        return (self.num_codes + 2 + label, self.sides[granularity] ** 2 + 2 + label, granularity)

    def end(self, granularity):
        return (self.num_codes + 1, self.sides[granularity] ** 2 + 1, granularity)

    def stream(self, codes, grain_map, label=0):
        elements = []
        for granularity in range(2):
            elements.append(self.start(granularity, label))
            for row, column in self.training_order(granularity):
                step = 2 - granularity  # side of a code, in fine cells
                region = grain_map[row * step // 2, column * step // 2]
                if region == granularity:
                    content = int(codes[row * step, column * step])
                    elements.append((content, row * self.sides[granularity] + column, granularity))
            elements.append(self.end(granularity))
        return elements

    def blocks(self, key, x, num_layers):
        length, width = x.shape
        heads = self.stack["n_head"]
        causal = torch.full((length, length), -math.inf).triu(1)
        for layer in range(num_layers):
            name = f"transformer.{key}.{layer}"
            normed = self.layer_norm(f"{name}.ln1", x)
            q, k, v = (
                self.linear(f"{name}.attn.{part}", normed, width).view(length, heads, -1).transpose(0, 1)
                for part in ("query", "key", "value")
            )
            weights = (q @ k.transpose(1, 2) * (width / heads) ** -0.5 + causal).softmax(-1)
            attended = (weights @ v).transpose(0, 1).reshape(length, width)
            x = x + self.linear(f"{name}.attn.proj", attended, width)
            hidden = F.gelu(self.linear(f"{name}.mlp.0", self.layer_norm(f"{name}.ln2", x), 4 * width))
            x = x + self.linear(f"{name}.mlp.2", hidden, width)
        return x

    def layer_norm(self, key, x):
        weight, bias = (self.tensor(f"{key}.{name}", x.shape[-1]) for name in ("weight", "bias"))
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-5)

    def head(self, key, x, size):
        x = self.layer_norm(f"transformer.{key}.0", x)
        return x @ self.tensor(f"transformer.{key}.1.weight", size, x.shape[-1]).t()

    def embed_positions(self, elements):
        tables = [
            self.tensor(
                f"transformer.content_{word}_pos_emb.weight",
                self.stack[f"{word}_position_size"],
                self.stack["n_embd"],
            )
            for word in self.words
        ]
        return torch.stack([tables[granularity][position] for _, position, granularity in elements])

    def position_states(self, elements):
        width = self.stack["n_embd"]
        contents = self.tensor("transformer.content_emb.weight", self.stack["vocab_size"], width)
        segments = self.tensor("transformer.seg_emb.weight", 2, width)
        places = self.tensor("transformer.pos_emb", 1, self.stack["block_size"], width)
        x = contents[[element[0] for element in elements]] + segments[[element[2] for element in elements]]
        x = x + self.embed_positions(elements) + places[0, : len(elements)]
        return self.blocks("position_transformer", x, self.stack["position_layer"])

    def position_logits(self, states):
        return self.head("position_head", states, self.stack["fine_position_size"])

    def content_logits(self, states, following):
        x = self.blocks("content_transformer", states + self.embed_positions(following), self.stack["content_layer"])
        return self.head("content_head", x, self.stack["vocab_size"])

    def greedy(self, mode, label=0):
        """The stream of the largest logits, and its codes."""
        elements, codes, covered = [], torch.zeros(self.sides[1], self.sides[1], dtype=torch.long), set()
        for granularity in range(2):
            elements.append(self.start(granularity, label))
            side, step = self.sides[granularity], 2 - granularity
            while elements[-1] != self.end(granularity):
                free = [
                    row * side + column
                    for row, column in self.training_order(granularity)
                    if (row * step, column * step) not in covered
                ]
                allowed = free[:1] if granularity and mode == "fixed" else free
                if granularity == 0 or not free:
                    allowed = [*allowed, side**2 + 1]
                states = self.position_states(elements)
                logits = self.position_logits(states)[-1]
                position = max(allowed, key=lambda place: float(logits[place]))
                if position == side**2 + 1:
                    elements.append(self.end(granularity))
                    continue
                following = [*elements[1:], (0, position, granularity)]
                content = int(self.content_logits(states, following)[-1, : self.num_codes].argmax())
                elements.append((content, position, granularity))
                row, column = position // side * step, position % side * step
                codes[row : row + step, column : column + step] = content
                covered |= {(row + i, column + j) for i in range(step) for j in range(step)}
        return elements, codes


@pytest.mark.parametrize("name", VAES)
def test_slow_version_of_the_vae_agrees_with_the_reference(name):
    expected = load_file(REFERENCE / name / "expected.safetensors")
    release = Release(load_config(name), load_state(name))
    hidden, routing, grain_map, codes, loss = release.encode(expected["image"])
    results = {"hidden": hidden, "grain_map": grain_map, "codes": codes, "vq_loss": loss}
    results["entropy" if name == "dual_entropy" else "gate"] = routing
    results["decoded_from_codes"] = release.decode(codes)
    for key, actual in results.items():
        compare(key, actual, expected[key])
    assert {key for key in release.state if not key.startswith("loss.")} == release.used


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_slow_version_of_the_transformer_agrees_with_the_reference(name):
    expected = load_file(REFERENCE / name / "expected.safetensors")
    release = Release(load_config(name), load_state(name))
    release.transformer_setup()
    _, _, grain_map, codes, _ = release.encode(expected["image"])
    labels = expected["class_labels"].tolist() if "class_labels" in expected else [0, 0]
    for image, label in enumerate(labels):
        elements = release.stream(codes[image], grain_map[image], label)
        states = release.position_states(elements[:-1])
        compare("position_logits", release.position_logits(states), expected[f"image{image}.position_logits"][0])
        content_logits = release.content_logits(states, elements[1:])
        compare("content_logits", content_logits, expected[f"image{image}.content_logits"][0])
    for mode in ("fixed", "free"):
        elements, codes = release.greedy(mode, 1 if "class_labels" in expected else 0)
        compare(mode, codes, expected[f"greedy_{mode}.code_grid"][0])
        contents, positions, _ = map(torch.tensor, zip(*elements))
        for part, actual in parts(contents, positions, len(elements)).items():
            compare(f"{mode}.{part}", actual, unpad(part, expected[f"greedy_{mode}.{part}"][0]))
    release.decode(codes[None])
    assert {key for key in release.state if not key.endswith("attn.mask")} == release.used


def changed(name, changes, prefix=""):
    """A reference configuration with other parameters, {"encoderconfig.router_config.gate_type": value}."""
    config = load_config(name)
    for path, value in changes.items():
        *sections, key = (prefix + path).split(".")
        params(config, *sections)[key] = value
    return config


def vae_size(resolution, fine_factor=2):
    return {
        "encoderconfig.resolution": resolution,
        "decoderconfig.resolution": resolution,
        "decoderconfig.latent_size": resolution // fine_factor,
    }


def budget_size(*sides):
    names = ["min_grain_size", "median_grain_size", "max_grain_size"] if len(sides) == 3 else None
    names = names or ["min_grain_size", "max_grain_size"]
    return {f"lossconfig.budget_loss_config.{name}": side for name, side in zip(names, sides)}


GATE = "encoderconfig.router_config.gate_type"
NORMALIZATION = "encoderconfig.router_config.normalization_type"
RATIO = "encoderconfig.router_config.fine_grain_ratito"

# name: reference configuration, changes to it, fields of ours that must come out
VAE_OPTIONS = {
    "gate of one layer": ("dual_feature", {GATE: "1layer-fc"}, {"router_activation": None}),
    "gate of one layer, triple": ("triple_feature", {GATE: "1layer-fc"}, {"router_activation": None}),
    "ReLU gate": ("dual_feature", {GATE: "2layer-fc-ReLu"}, {"router_activation": "relu"}),
    "no normalisation": ("dual_feature", {NORMALIZATION: "none"}, {"router_norm_num_groups": None}),
    "no normalisation, triple": ("triple_feature", {NORMALIZATION: "none"}, {"router_norm_num_groups": None}),
    "8 groups": ("dual_feature", {NORMALIZATION: "group-8"}, {"router_norm_num_groups": 8}),
    "Fourier": ("dual_feature", {"decoderconfig.position_type": "fourier"}, {"position_type": "fourier"}),
    "learned": ("dual_entropy", {"decoderconfig.position_type": "learned"}, {"position_type": "learned"}),
    "attention elsewhere": (
        "dual_feature",
        {"encoderconfig.attn_resolutions": [16, 5], "decoderconfig.attn_resolutions": [32, 16]},
        {"encoder_attention_factors": [1], "decoder_attention_factors": [1]},
    ),
    "no attention": (
        "triple_feature",
        {"encoderconfig.attn_resolutions": [], "decoderconfig.attn_resolutions": []},
        {"encoder_attention_factors": [], "decoder_attention_factors": []},
    ),
    "more residual blocks": (
        "dual_feature",
        {"encoderconfig.num_res_blocks": 2, "decoderconfig.num_res_blocks": 2},
        {"layers_per_block": 2, "decoder_layers_per_block": 2},
    ),
    "decoder unlike encoder": (
        "triple_feature",
        {
            "encoderconfig.num_res_blocks": 2,
            "decoderconfig.ch": 64,
            "decoderconfig.ch_mult": [1, 2],
            "decoderconfig.attn_resolutions": [32],
        },
        {
            "layers_per_block": 2,
            "decoder_layers_per_block": 1,
            "block_out_channels": [32, 32, 64, 64],
            "decoder_block_out_channels": [64, 128],
            "encoder_attention_factors": [2, 4, 8],
            "decoder_attention_factors": [1],
        },
    ),
    "more levels": (
        "dual_feature",
        {"encoderconfig.ch_mult": [1, 2, 1, 2], "decoderconfig.ch_mult": [2, 1, 1]}
        | vae_size(16, fine_factor=4)
        | budget_size(2, 4),
        {"granularities": [8, 4], "encoder_attention_factors": [2, 4], "decoder_attention_factors": [2]},
    ),
    "widths": (
        "dual_feature",
        {
            "encoderconfig.z_channels": 64,
            "encoderconfig.router_config.num_channels": 64,
            "decoderconfig.in_ch": 64,
            "quant_before_dim": 64,
            "quant_after_dim": 24,
            "vqconfig.codebook_dim": 24,
            "vqconfig.codebook_size": 50,
        },
        {"z_channels": 64, "codebook_dim": 24, "codebook_size": 50},
    ),
    "24 pixels": (
        "dual_entropy",
        vae_size(24) | {"image_size": 24, "encoderconfig.attn_resolutions": [6, 12], RATIO: 0.25},
        {
            "image_size": 24,
            "encoder_attention_factors": [2, 4],
            "decoder_attention_factors": [],
            "entropy_thresholds": [1.9942057132720947],
        },
    ),
    "24 pixels, features": ("dual_feature", vae_size(24) | budget_size(6, 12), {"image_size": 24}),
    "48 pixels, triple": ("triple_feature", vae_size(48) | budget_size(6, 12, 24), {"image_size": 48}),
    "training": (
        "dual_feature",
        {
            "encoderconfig.dropout": 0.1,
            "vqconfig.commitment_beta": 0.5,
            "vqconfig.decay": 0.9,
            "vqconfig.restart_unused_codes": True,
            "lossconfig.codebook_weight": 2.0,
            "lossconfig.budget_loss_config.gamma": "1e1",
            "lossconfig.budget_loss_config.calculate_all": False,
            "lossconfig.budget_loss_config.target_ratio": 0.3,
        },
        {
            "dropout": 0.1,
            "commitment_beta": 0.5,
            "codebook_decay": 0.9,
            "restart_dead_codes": True,
            "codebook_weight": 2.0,
            "budget_gamma": 10.0,
            "budget_targets": [0.3],
        },
    ),
}


@pytest.mark.parametrize("option", VAE_OPTIONS)
def test_other_vae_options_convert(option, tmp_path):
    name, changes, fields = VAE_OPTIONS[option]
    config = changed(name, changes)
    release = Release(config)
    resolution = release.encoder["resolution"]
    image = torch.rand(2, 3, resolution, resolution, generator=torch.Generator().manual_seed(1)) * 2 - 1
    image[:, :, : resolution // 2] = image[:, :, :1, :1]  # flat: some regions of low entropy
    with torch.no_grad():
        hidden, routing, grain_map, codes, loss = release.encode(image)
        decoded = release.decode(codes)
    assert len(grain_map.unique()) > 1 and len(codes.unique()) > 4

    convert_checkpoint(*write(tmp_path / "release", config, release.state), tmp_path / "ours")
    model = DQVAEModel.from_pretrained(tmp_path / "ours")
    assert {field: getattr(model.config, field) for field in fields} == fields
    with torch.no_grad():
        encoded = model.encode(image)
        compare("hidden", encoded.hidden_states, hidden)
        compare("routing", encoded.entropy if model.config.router == "entropy" else encoded.router_logits, routing)
        compare("grain_map", encoded.grain_map, grain_map)
        compare("codes", encoded.codes, codes)
        compare("vq_loss", encoded.loss, loss)
        compare("decoded", model.decode_codes(encoded.codes).sample, decoded)
    processor = DQImageProcessor.from_pretrained(tmp_path / "ours")
    assert processor.size == {"height": resolution, "width": resolution}


@pytest.mark.parametrize("kind", ["fourier", "learned"])
def test_positions_of_one_kind_may_be_named_without_it(kind, tmp_path):
    config = changed("dual_feature", {"decoderconfig.position_type": kind})
    release = Release(config)
    release.decode(release.encode(torch.zeros(1, 3, 16, 16))[3])
    state = {key.replace(f"position_bias_{kind}", "position_bias"): value for key, value in release.state.items()}
    assert state.keys() != release.state.keys()
    ours = convert_checkpoint(*write(tmp_path / "a", config, state), tmp_path / "ours a").state_dict()
    other = convert_checkpoint(*write(tmp_path / "b", config, release.state), tmp_path / "ours b").state_dict()
    assert all(torch.equal(ours[key], other[key]) for key in other)


def transformer_size(num_codes, coarse_side, num_classes):
    """Everything in a DQ-Transformer's configuration that follows from its sizes."""
    coarse, fine, start_tokens = coarse_side**2, 4 * coarse_side**2, max(num_classes, 1)
    changes = {
        "transformer_config.vocab_size": num_codes + 2 + start_tokens,
        "transformer_config.coarse_position_size": coarse + 2 + start_tokens,
        "transformer_config.fine_position_size": fine + 2 + start_tokens,
        "transformer_config.content_pad_code": num_codes,
        "transformer_config.coarse_position_pad_code": coarse,
        "transformer_config.fine_position_pad_code": fine,
        "permuter_config.coarse_hw": coarse_side,
        "permuter_config.fine_hw": 2 * coarse_side,
        "permuter_config.content_pad_code": num_codes,
        "permuter_config.content_eos_code": num_codes + 1,
        "permuter_config.coarse_position_pad_code": coarse,
        "permuter_config.coarse_position_eos_code": coarse + 1,
        "permuter_config.fine_position_pad_code": fine,
        "permuter_config.fine_position_eos_code": fine + 1,
    }
    if num_classes:
        changes |= {
            "class_cond_stage_config.n_classes": num_classes,
            "class_cond_stage_config.threshold_content": num_codes + 2,
            "class_cond_stage_config.threshold_coarse_position": coarse + 2,
            "class_cond_stage_config.threshold_fine_position": fine + 2,
        }
    else:
        changes |= {
            "uncond_stage_config.coarse_sos": num_codes + 2,
            "uncond_stage_config.fine_sos": num_codes + 2,
            "uncond_stage_config.coarse_pos_sos": coarse + 2,
            "uncond_stage_config.fine_pos_sos": fine + 2,
        }
    return changes


REGION_FIRST = {"permuter_config.fine_position_order": "region-first"}
FIRST_24 = {f"first_stage_config.{key}": value for key, value in (vae_size(24) | {"image_size": 24}).items()}
FEATURE_STAGE = {
    "first_stage_config.encoderconfig.router_config": load_config("dual_feature")["model"]["params"]["encoderconfig"][
        "params"
    ]["router_config"]
}
TRANSFORMER_OPTIONS = {
    "region-first": ("transformer_uncond", REGION_FIRST, {"fine_order": "region-first"}),
    "region-first by class": ("transformer_class", REGION_FIRST, {"fine_order": "region-first", "num_classes": 10}),
    "layers and heads": (
        "transformer_class",
        {
            "transformer_config.position_layer": 3,
            "transformer_config.content_layer": 1,
            "transformer_config.n_head": 8,
            "transformer_config.n_embd": 48,
            "transformer_config.embd_pdrop": 0.0,
            "transformer_config.resid_pdrop": 0.2,
            "transformer_config.attn_pdrop": 0.3,
        },
        {
            "num_position_layers": 3,
            "num_content_layers": 1,
            "num_attention_heads": 8,
            "hidden_size": 48,
            "embedding_dropout": 0.0,
            "residual_dropout": 0.2,
            "attention_dropout": 0.3,
        },
    ),
    "classes and codes": (
        "transformer_class",
        transformer_size(20, 4, 3) | {"first_stage_config.vqconfig.codebook_size": 20},
        {"num_classes": 3, "codebook_size": 20, "content_vocab_size": 25, "position_vocab_sizes": [21, 69]},
    ),
    "block size": ("transformer_uncond", {"transformer_config.block_size": 100}, {"max_stream_length": 100}),
    "shortest block size": ("transformer_uncond", {"transformer_config.block_size": 68}, {"max_stream_length": 68}),
    "24 pixels": (
        "transformer_class",
        transformer_size(32, 6, 10) | FIRST_24 | REGION_FIRST | {"transformer_config.block_size": 148},
        {"grid_sizes": [[6, 6], [12, 12]], "max_stream_length": 148},
    ),
    "loss weights": (
        "transformer_uncond",
        {"content_loss_weight": 0.5, "position_loss_weight": 2},
        {"content_loss_weight": 0.5, "position_loss_weight": 2},
    ),
    "feature router": ("transformer_uncond", FEATURE_STAGE, {}),
}


@pytest.mark.parametrize("option", TRANSFORMER_OPTIONS)
def test_other_transformer_options_convert(option, tmp_path):
    name, changes, fields = TRANSFORMER_OPTIONS[option]
    config = changed(name, changes)
    if option == "feature router":
        for key in ("entropy_patch_size", "image_size"):
            del params(config, "first_stage_config")[key]
    release = Release(config)
    release.transformer_setup()
    label = 2 if name == "transformer_class" else 0
    size = release.encoder["resolution"]
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    image[:, :, : size // 2] = image[:, :, :1, :1]
    with torch.no_grad():
        _, _, grain_map, codes, _ = release.encode(image)
        release.decode(codes)
        elements = release.stream(codes[0], grain_map[0], label)
        states = release.position_states(elements[:-1])
        position_logits = release.position_logits(states)
        content_logits = release.content_logits(states, elements[1:])
        greedy = {mode: release.greedy(mode, label) for mode in ("fixed", "free")}
    assert len(grain_map.unique()) == 2

    convert_checkpoint(*write(tmp_path / "release", config, release.state), tmp_path / "ours")
    model = DQForImageGeneration.from_pretrained(tmp_path / "ours")
    assert {field: getattr(model.transformer.config, field) for field in fields} == fields
    labels = label if name == "transformer_class" else None
    with torch.no_grad():
        encoded = model.vae.encode(image)
        compare("codes", encoded.codes, codes)
        compare("grain_map", encoded.grain_map, grain_map)
        output = model.transformer(encoded.codes, encoded.grain_map, labels)
        compare("position_logits", output.position_logits[0], position_logits)
        compare("content_logits", output.content_logits[0], content_logits)
        for mode, (elements, codes) in greedy.items():
            generated = model.transformer.generate(labels, do_sample=False, fine_positions=mode)
            stream = list(zip(generated.contents[0].tolist(), generated.positions[0].tolist()))
            assert stream == [element[:2] for element in elements], mode
            compare(mode, generated.codes[0], codes)


def refuse(tmp_path, config, state, message, error=ValueError):
    paths = write(tmp_path / "release", config, state)
    with pytest.raises(error, match=message):
        convert_checkpoint(*paths, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


ROUTER = "encoderconfig.router_config"
BUDGET = "lossconfig.budget_loss_config"
# reference configuration, section, its new target
WRONG_TARGETS = [
    ("dual_entropy", "", "models.other.QuadGrainVQModel"),
    ("dual_entropy", "", "models.other.TripleGrainVQModel"),
    ("dual_entropy", "encoderconfig", "modules.EncoderTriple.TripleGrainEncoder"),
    ("dual_entropy", "decoderconfig", "modules.Decoder2"),
    ("dual_entropy", "vqconfig", "modules.VectorQuantize3"),
    ("dual_entropy", "lossconfig", "modules.OtherLoss"),
    ("dual_feature", ROUTER, "modules.RouterTriple.TripleGrainFeatureRouter"),
    ("triple_feature", ROUTER, "modules.RouterTriple.TripleGrainFixedEntropyRouter"),
    ("dual_feature", BUDGET, "modules.BudgetConstraint_NormedSeperateRatioMSE_TripleGrain"),
    ("transformer_class", "", "models.Tripleformer"),
    ("transformer_class", "transformer_config", "modules.GPT"),
    ("transformer_class", "permuter_config", "modules.TripleGrainPermuter"),
    ("transformer_class", "class_cond_stage_config", "modules.PositionAwareSOSProvider"),
    ("transformer_uncond", "uncond_stage_config", "modules.ClassAwareSOSProvider"),
    ("transformer_uncond", "first_stage_config", "models.VQModel"),
]


@pytest.mark.parametrize(("name", "path", "target"), WRONG_TARGETS)
def test_unknown_targets_are_refused(name, path, target, tmp_path):
    config = load_config(name)
    *sections, last = ["model", *path.split(".")] if path else ["model"]
    section = config["model"] if not sections else params(config, *sections[1:])[last]
    section["target"] = target
    message = {"models.other.TripleGrainVQModel": "TripleGrainEncoder"}.get(target, re.escape(target))
    refuse(tmp_path, config, {}, rf"(?s)config\.yml: .*target must be one of.*{message}")


WRONG_VALUES = [
    ("dual_feature", GATE, "3layer-fc", "gate_type must be one of 1layer-fc, 2layer-fc-SiLu"),
    ("dual_feature", NORMALIZATION, "batch", "normalization_type must be"),
    ("dual_feature", NORMALIZATION, "group-7", "router_norm_num_groups"),
    ("dual_feature", NORMALIZATION, "group-0", "router_norm_num_groups"),
    ("dual_feature", f"{ROUTER}.num_channels", 64, "num_channels must be 32"),
    ("dual_feature", f"{BUDGET}.min_grain_size", 8, "min_grain_size must be 4"),
    ("dual_feature", f"{BUDGET}.max_grain_size", 4, "max_grain_size must be 8"),
    ("triple_feature", f"{BUDGET}.median_grain_size", 4, "median_grain_size must be 8"),
    ("dual_feature", f"{BUDGET}.target_ratio", 1.5, "budget_targets"),
    ("dual_feature", f"{BUDGET}.gamma", "much", "gamma must be a finite number, got 'much'"),
    ("dual_feature", f"{BUDGET}.gamma", float("nan"), "gamma must be a finite number"),
    ("dual_feature", f"{BUDGET}.calculate_all", 1, "calculate_all must be true or false"),
    ("dual_entropy", "decoderconfig.position_type", "rope", "position_type must be"),
    ("dual_entropy", "decoderconfig.latent_size", 4, "latent_size must be 8"),
    ("dual_entropy", "decoderconfig.in_ch", 64, "in_ch must be 32"),
    ("dual_entropy", "decoderconfig.out_ch", 1, "out_ch must be 3"),
    ("dual_entropy", "decoderconfig.resolution", 32, "resolution must be 16"),
    ("dual_entropy", "decoderconfig.ch_mult", [1, 1, 1], "ch_mult must have 2 levels"),
    ("dual_entropy", "decoderconfig.dropout", 0.5, "dropout must be 0.0"),
    ("dual_entropy", "encoderconfig.ch_mult", [1], "ch_mult must have a level for each of 2 granularities"),
    ("dual_entropy", "encoderconfig.ch_mult", [], "ch_mult must have a level for each of 2 granularities"),
    ("dual_entropy", "decoderconfig.ch_mult", [], r"decoderconfig.*ch_mult must have 2 levels"),
    ("dual_entropy", "encoderconfig.ch_mult", 2, "ch_mult must be a list of integers"),
    ("dual_entropy", "encoderconfig.ch", 16, "multiple of norm_num_groups"),
    ("dual_entropy", "encoderconfig.ch", "32", "ch must be an integer, got '32'"),
    ("dual_entropy", "encoderconfig.num_res_blocks", 1.5, "num_res_blocks must be an integer"),
    ("dual_entropy", "encoderconfig.num_res_blocks", True, "num_res_blocks must be an integer"),
    ("dual_entropy", "encoderconfig.num_res_blocks", 0, "layers_per_block must be positive"),
    ("dual_entropy", "encoderconfig.in_channels", 1, "in_channels must be 3"),
    ("dual_entropy", "encoderconfig.resamp_with_conv", False, "resamp_with_conv must be True"),
    ("dual_entropy", "encoderconfig.dropout", 1.0, "dropout must lie in"),
    ("dual_entropy", "encoderconfig.attn_resolutions", 8, "attn_resolutions must be a list"),
    ("dual_entropy", "vqconfig.channel_last", True, "channel_last must be False"),
    ("dual_entropy", "vqconfig.codebook_dim", 16, "quant_after_dim must be 16"),
    ("dual_entropy", "quant_before_dim", 64, "quant_before_dim must be 32"),
    ("dual_entropy", "entropy_patch_size", 8, "entropy_patch_size must be 4"),
    ("dual_entropy", "image_size", 32, "image_size must be 16"),
    ("dual_entropy", RATIO, 0.125, "fine_grain_ratito must be a whole percentage"),
    ("dual_entropy", RATIO, 1.5, "fine_grain_ratito must be"),
    ("dual_entropy", RATIO, 1.0, r"(?s)percentile 0 .*got None"),
    ("transformer_uncond", "permuter_config.fine_position_order", "random", "fine_position_order must be"),
    ("transformer_uncond", "transformer_config.block_size", 67, "max_stream_length must be at least 68"),
    ("transformer_uncond", "transformer_config.n_head", 5, "num_attention_heads"),
    ("transformer_uncond", "transformer_config.segment_size", 3, "segment_size must be 2"),
    ("transformer_uncond", "transformer_config.activate_pad_ignore", False, "activate_pad_ignore must be True"),
    ("transformer_uncond", "activate_sos_for_fine_sequence", False, "activate_sos_for_fine_sequence must be True"),
    ("transformer_uncond", "uncond_stage_config.fine_seg_sos", 0, "fine_seg_sos must be 1"),
    ("transformer_class", "class_cond_stage_config.coarse_seg_sos", 1, "coarse_seg_sos must be 0"),
    ("transformer_uncond", "first_stage_config.entropy_patch_size", 2, "entropy_patch_size must be 4"),
    *(
        (name, path, value + 1, rf"{path.rpartition('.')[2]} must be {value}|vocab_size must be 45")
        for name, classes in (("transformer_uncond", 0), ("transformer_class", 10))
        for path, value in transformer_size(32, 4, classes).items()
    ),
]


@pytest.mark.parametrize(("name", "path", "value", "message"), WRONG_VALUES)
def test_values_that_are_wrong_or_contradict_others_are_refused(name, path, value, message, tmp_path):
    refuse(tmp_path, changed(name, {path: value}), {}, message)


SECTIONS = {
    "dual_feature": ["", "encoderconfig", ROUTER, "decoderconfig", "vqconfig", "lossconfig", BUDGET],
    "dual_entropy": [ROUTER],
    "transformer_class": [
        "",
        "transformer_config",
        "permuter_config",
        "class_cond_stage_config",
        "first_stage_config",
    ],
    "transformer_uncond": ["uncond_stage_config"],
}


@pytest.mark.parametrize(("name", "section"), [(name, path) for name in SECTIONS for path in SECTIONS[name]])
def test_unknown_parameters_are_refused(name, section, tmp_path):
    config = changed(name, {f"{section}.no_such_parameter".lstrip("."): 1})
    refuse(tmp_path, config, {}, rf"{section.rpartition('.')[2]}.*does not know: no_such_parameter")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("dual_entropy", "encoderconfig"),
        ("dual_entropy", "encoderconfig.num_res_blocks"),
        ("dual_entropy", "encoderconfig.attn_resolutions"),
        ("dual_entropy", "encoderconfig.router_config"),
        ("dual_entropy", f"{ROUTER}.json_path"),
        ("dual_entropy", RATIO),
        ("dual_entropy", "entropy_patch_size"),
        ("dual_entropy", "image_size"),
        ("dual_entropy", "decoderconfig.latent_size"),
        ("dual_entropy", "decoderconfig.position_type"),
        ("dual_entropy", "vqconfig.codebook_size"),
        ("dual_entropy", "quant_after_dim"),
        ("dual_feature", GATE),
        ("dual_feature", NORMALIZATION),
        ("dual_feature", f"{BUDGET}.target_ratio"),
        ("dual_feature", f"{BUDGET}.calculate_all"),
        ("transformer_class", "first_stage_config"),
        ("transformer_class", "permuter_config.fine_hw"),
        ("transformer_class", "class_cond_stage_config.n_classes"),
        ("transformer_class", "transformer_config.vocab_size"),
    ],
)
def test_missing_parameters_are_refused(name, path, tmp_path):
    config = load_config(name)
    *sections, key = path.split(".")
    del params(config, *sections)[key]
    refuse(tmp_path, config, {}, rf"config.yml: .*{key} is missing")


def test_a_model_is_conditional_or_not(tmp_path):
    config = load_config("transformer_class")
    both = copy.deepcopy(config)
    params(both)["uncond_stage_config"] = params(load_config("transformer_uncond"))["uncond_stage_config"]
    refuse(tmp_path, both, {}, "either class_cond_stage_config or uncond_stage_config")
    del params(config)["class_cond_stage_config"]
    refuse(tmp_path, config, {}, "either class_cond_stage_config or uncond_stage_config")


def test_a_configuration_of_only_documented_extras_converts(tmp_path):
    """Parameters that have no effect on the model may be there or not."""
    config = load_config("dual_feature")
    del params(config)["lossconfig"], params(config)["scheduler_type"]
    params(config, "encoderconfig")["update_router"] = True
    params(config).update(ckpt_path="last.ckpt", ignore_keys=[], monitor="val/loss")
    config["data"] = {"target": "main.DataModule"}
    model = convert_checkpoint(*write(tmp_path / "release", config, load_state("dual_feature")), tmp_path / "ours")
    assert (model.config.budget_targets, model.config.budget_gamma) == ([0.5], 10.0)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "cannot read the entropy thresholds .*thresholds.json"),
        ("{", ValueError, "not a JSON file"),
        ("[1, 2]", ValueError, "must give a number for percentile 50"),
        ('{"25": 1.0}', ValueError, "must give a number for percentile 50"),
        ('{"50": "1.0"}', ValueError, "must give a number for percentile 50"),
        ('{"50": NaN}', ValueError, "must give a number for percentile 50"),
    ],
)
def test_a_missing_or_damaged_entropy_table_is_refused(content, error, message, tmp_path):
    config = changed("dual_entropy", {f"{ROUTER}.json_path": "thresholds.json"})
    (tmp_path / "release").mkdir()
    if content is not None:
        (tmp_path / "release" / "thresholds.json").write_text(content)
    refuse(tmp_path, config, {}, message, error)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "there is no configuration"),
        (b"model: [", ValueError, "is not a YAML file"),
        (b"\xff\xfe\x00", ValueError, "is not a YAML file"),
        (b"", ValueError, "section `model`"),
        (b"- model", ValueError, "section `model`"),
        (b"model: 3", ValueError, "model must have a target and params"),
        (b"model: {target: a.DualGrainVQModel, params: 3}", ValueError, "params must be a mapping"),
        (b"model: {target: a.DualGrainVQModel, extra: 3}", ValueError, "unknown entries: extra"),
        (b"model: {target: a.DualGrainVQModel}", ValueError, "encoderconfig is missing"),
    ],
)
def test_a_missing_or_damaged_configuration_is_refused(content, error, message, tmp_path):
    path = tmp_path / "config.yml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        convert_checkpoint(path, REFERENCE / "dual_entropy" / "model.ckpt", tmp_path / "ours")


def flip_a_weight_byte(content):
    """One byte of tensor data changed: still a readable file."""
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 0xFF
    return bytes(damaged)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:100_000],
        lambda content: b"",
        lambda content: b"no checkpoint" * 99,
        flip_a_weight_byte,
    ],
    ids=["cut off", "empty", "text", "byte"],
)
def test_a_damaged_checkpoint_is_refused(damage, tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(damage((REFERENCE / "dual_entropy" / "model.ckpt").read_bytes()))
    with pytest.raises(OSError, match=r"model\.ckpt is damaged"):
        convert_checkpoint(REFERENCE / "dual_entropy" / "config.yml", path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


class Malicious:
    """What unpickling must not run."""

    def __reduce__(self):
        return (print, ("code of the checkpoint ran",))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ([1, 2], ValueError, "must be a dict with the tensors in 'state_dict', got list"),
        ({"epoch": 1}, ValueError, "must be a dict with the tensors in 'state_dict', got a dict with epoch"),
        ({"state_dict": {}}, ValueError, "tensors in 'state_dict'"),
        ({"state_dict": [torch.zeros(1)]}, ValueError, "tensors in 'state_dict'"),
        ({"state_dict": {"encoder": {"conv": torch.zeros(1)}}}, ValueError, "got dict for key 'encoder'"),
        ({"state_dict": {1: torch.zeros(1)}}, ValueError, "key 1"),
        ({"state_dict": {}, "date": datetime.date(2023, 1, 1)}, OSError, r"more than tensors .*datetime\.date"),
        ({"state_dict": Malicious()}, OSError, r"more than tensors .*print was not.*save it again"),
    ],
)
def test_other_contents_of_a_checkpoint_are_refused(content, error, message, tmp_path):
    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(error, match=message):
        convert_checkpoint(REFERENCE / "dual_entropy" / "config.yml", tmp_path / "model.ckpt", tmp_path / "ours")


def test_a_plain_pickle_a_foreign_archive_and_no_file_are_refused(tmp_path):
    config, path = REFERENCE / "dual_entropy" / "config.yml", tmp_path / "model.ckpt"
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        convert_checkpoint(config, path, tmp_path / "ours")
    path.write_bytes(pickle.dumps({"state_dict": Malicious()}, protocol=2))
    with pytest.raises(OSError, match="damaged or holds more than tensors"):
        convert_checkpoint(config, path, tmp_path / "ours")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "text")
    with pytest.raises(OSError, match="is damaged or not a PyTorch file"):
        convert_checkpoint(config, path, tmp_path / "ours")


@pytest.mark.parametrize("name", ["triple_feature", "transformer_class"])
def test_every_missing_key_is_named(name, converted):
    model, state = converted(name), load_state(name)
    if name == "transformer_class":
        state = {key: value for key, value in state.items() if key.startswith("transformer.")}
        convert, config, prefix = transformer_state_dict, model.transformer.config, "transformer."
    else:
        convert, config, prefix = vae_state_dict, model.config, ""
    needed = [key for key in state if not key.startswith("loss.") and not key.endswith("attn.mask")]
    for key in needed[:: len(needed) // 12]:  # each of some 12 keys all over the model
        with pytest.raises(ValueError, match=rf"^{re.escape(key)} is missing"):
            convert({other: state[other] for other in state if other != key}, config, prefix)
    assert convert({key: state[key] for key in needed}, config, prefix).keys() == convert(state, config, prefix).keys()


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("dual_entropy", "encoder.extra.weight", torch.zeros(1), "encoder.extra.weight is unknown"),
        ("dual_entropy", "encoder.loss.weight", torch.zeros(1), "encoder.loss.weight is unknown"),
        ("dual_entropy", "decoder.up.2.block.0.norm1.weight", torch.zeros(32), "decoder.up.2.* is unknown"),
        ("dual_entropy", "encoder.router.gate.weight", torch.zeros(2, 64), "encoder.router.gate.weight is unknown"),
        (
            "dual_entropy",
            "decoder.conv_out.bias",
            torch.full((3,), torch.nan),
            "decoder.conv_out.bias must hold finite",
        ),
        ("dual_entropy", "decoder.conv_out.bias", torch.zeros(3, dtype=torch.long), "must hold finite floating-point"),
        (
            "dual_entropy",
            "quantize.codebook.weight",
            torch.zeros(32, 32),
            r"quantize.codebook.weight has shape \(32, 32\), expected \(33, 32\)",
        ),
        ("dual_entropy", "encoder.mid_fine.attn_1.q.weight", torch.zeros(32, 32), r"expected \(32, 32, 1, 1\)"),
        ("transformer_class", "first_stage_model.extra", torch.zeros(1), "first_stage_model.extra is unknown"),
        ("transformer_class", "transformer.extra", torch.zeros(1), "transformer.extra is unknown"),
        ("transformer_class", "other.extra", torch.zeros(1), "unknown keys other.extra"),
        ("transformer_class", "transformer.pos_emb", torch.zeros(88, 32), r"expected \(1, 88, 32\)"),
    ],
)
def test_unknown_keys_and_broken_tensors_are_named(name, key, value, message, tmp_path):
    state = load_state(name) | {key: value}
    refuse(tmp_path, load_config(name), state, rf"model\.ckpt does not fit .*config\.yml: .*{message}")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dual_entropy", {"encoderconfig.ch": 64}, r"encoder.conv_in.weight has shape \(32, 3, 3, 3\), expected \(64"),
        ("dual_entropy", {"encoderconfig.num_res_blocks": 2}, "encoder.down.0.block.1.norm1.weight is missing"),
        ("dual_entropy", {"vqconfig.codebook_size": 10**9}, "quantize.codebook.weight has shape"),  # not allocated
        ("dual_entropy", {"vqconfig.codebook_size": 64}, r"quantize.codebook.weight has shape .* expected \(65, 32\)"),
        ("dual_entropy", {"decoderconfig.attn_resolutions": []}, "decoder.up.1.attn.0.norm.weight is unknown"),
        ("dual_entropy", {"decoderconfig.position_type": "learned"}, "position_bias_fourier.* is unknown"),
        ("dual_feature", {GATE: "1layer-fc"}, "encoder.router.gate.weight is missing"),
        ("dual_feature", {NORMALIZATION: "none"}, "encoder.router.feature_norm_coarse.weight is unknown"),
        ("transformer_uncond", {"transformer_config.content_layer": 4}, "content_transformer.3.*is missing"),
        ("transformer_uncond", {"transformer_config.position_layer": 1}, "position_transformer.1.* is unknown"),
        (
            "transformer_uncond",
            {"transformer_config.block_size": 100},
            r"pos_emb has shape .* expected \(1, 100, 32\)",
        ),
        ("transformer_uncond", {"transformer_config.n_embd": 64}, r"content_emb.weight has .* expected \(35, 64\)"),
        ("transformer_class", transformer_size(32, 4, 12), r"content_emb.weight has .* expected \(46, 32\)"),
    ],
)
def test_sizes_that_do_not_fit_the_checkpoint_are_refused(name, changes, message, tmp_path):
    refuse(tmp_path, changed(name, changes), load_state(name), message)


def test_first_stage_and_generator_are_not_mixed_up(tmp_path):
    refuse(
        tmp_path, load_config("dual_entropy"), load_state("transformer_uncond"), "encoder.conv_in.weight is missing"
    )
    refuse(
        tmp_path, load_config("transformer_uncond"), load_state("dual_entropy"), "unknown keys decoder.conv_in.bias"
    )


def test_output_is_not_overwritten_without_force(tmp_path):
    vae = REFERENCE / "dual_entropy" / "config.yml", REFERENCE / "dual_entropy" / "model.ckpt"
    both = REFERENCE / "transformer_class" / "config.yml", REFERENCE / "transformer_class" / "model.ckpt"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="must be a folder"):
        convert_checkpoint(*vae, tmp_path / "file", force=True)
    folder = tmp_path / "ours"
    folder.mkdir()
    convert_checkpoint(*vae, folder)  # an empty folder is fine
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="is not empty; choose another or overwrite with force"):
        convert_checkpoint(*both, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    convert_checkpoint(*both, folder, force=True)
    assert DQForImageGeneration.from_pretrained(folder).config.transformer_config.num_classes == 10
    assert not (folder / "model.safetensors").exists()
    convert_checkpoint(*vae, folder, force=True)
    assert DQVAEModel.from_pretrained(folder).config.codebook_size == 32
    assert not (folder / "model_index.json").exists()


@pytest.mark.parametrize(
    ("old", "new"), [("dual_entropy", "transformer_class"), ("transformer_class", "dual_entropy")]
)
def test_the_old_model_stays_until_the_new_one_is_written(old, new, tmp_path):
    convert_checkpoint(REFERENCE / old / "config.yml", REFERENCE / old / "model.ckpt", tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with full_disk(100_000), pytest.raises(OSError, match="cannot be written"):
        convert_checkpoint(REFERENCE / new / "config.yml", REFERENCE / new / "model.ckpt", tmp_path, force=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_no_shard_of_an_old_tokenizer_stays_beside_a_new_model(tmp_path):
    paths = [REFERENCE / "transformer_class" / name for name in ("config.yml", "model.ckpt")]
    vae = convert_checkpoint(*(REFERENCE / "dual_entropy" / path.name for path in paths), tmp_path / "vae")
    vae.save_pretrained(tmp_path / "ours", max_shard_size="500KB")
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    convert_checkpoint(*paths, tmp_path / "ours", force=True)
    assert not list((tmp_path / "ours").glob("model*safetensors*"))
    assert (tmp_path / "ours" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["dual_entropy", "transformer_class"])
def test_the_returned_model_is_the_saved_one(name, tmp_path):
    model = convert_checkpoint(
        REFERENCE / name / "config.yml", REFERENCE / name / "model.ckpt", str(tmp_path / "ours")
    )
    assert not model.training
    saved = load_model(tmp_path / "ours", name).state_dict()
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    files = {"config.json", "preprocessor_config.json"}
    files |= {"model_index.json", "vae", "transformer"} if name == "transformer_class" else {"model.safetensors"}
    assert files <= names
