"""Released checkpoints become our folders: agreement with the release's outputs, other sizes, the published layout."""

import copy
import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import full_disk
from safetensors.torch import load_file
from slow_release import (
    REFERENCE,
    TRANSFORMERS,
    VAES,
    Release,
    budget_size,
    changed,
    draw_transformer,
    load_config,
    load_state,
    load_table,
    params,
    reference_paths,
    transformer_size,
    vae_size,
    write,
)

from dq_hf.modeling.grain_map_dq import expand_grain_map
from dq_hf.modeling.image_processing_dq import DQImageProcessor
from dq_hf.modeling.modeling_dq import DQForImageGeneration
from dq_hf.modeling.modeling_dqvae import DQVAEModel
from dq_hf.modeling.routing_dq import budget_loss
from dq_hf.release import convert_checkpoint

# Agreement that the reference asks for: absolute for tensors, relative for losses and gradients.
ABSOLUTE = {"atol": 1e-4, "rtol": 0}
RELATIVE = {"atol": 1e-7, "rtol": 1e-3}


def load_model(folder, name):
    return (DQForImageGeneration if name in TRANSFORMERS else DQVAEModel).from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Each reference checkpoint's model, converted once and loaded from its folder, by name."""
    models = {}

    def get(name):
        if name not in models:
            folder = tmp_path_factory.mktemp(name)
            convert_checkpoint(*reference_paths(name), folder)
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


GATE = "encoderconfig.router_config.gate_type"
NORMALIZATION = "encoderconfig.router_config.normalization_type"
RATIO = "encoderconfig.router_config.fine_grain_ratito"

# name: reference configuration, changes to it, fields of ours that must come out
VAE_OPTIONS = {
    "gate of one layer": (
        "triple_feature",
        {GATE: "1layer-fc", NORMALIZATION: "none"} | vae_size(48) | budget_size(6, 12, 24),
        {"router_activation": None, "router_norm_num_groups": None, "image_size": 48},
    ),
    "ReLU gate of few groups": (
        "dual_feature",
        {GATE: "2layer-fc-ReLu", NORMALIZATION: "group-8", "decoderconfig.position_type": "fourier"},
        {"router_activation": "relu", "router_norm_num_groups": 8, "position_type": "fourier"},
    ),
    "attention elsewhere": (
        "dual_feature",
        {
            "encoderconfig.attn_resolutions": [16, 5],
            "decoderconfig.attn_resolutions": [32, 16],
            "encoderconfig.num_res_blocks": 2,
        },
        {
            "encoder_attention_factors": [1],
            "decoder_attention_factors": [1],
            "layers_per_block": 2,
            "decoder_layers_per_block": 1,
        },
    ),
    "decoder unlike encoder": (
        "triple_feature",
        {
            "encoderconfig.attn_resolutions": [],
            "decoderconfig.num_res_blocks": 2,
            "decoderconfig.ch": 64,
            "decoderconfig.ch_mult": [1, 2],
            "decoderconfig.attn_resolutions": [32],
        },
        {
            "block_out_channels": [32, 32, 64, 64],
            "decoder_block_out_channels": [64, 128],
            "encoder_attention_factors": [],
            "decoder_attention_factors": [1],
            "decoder_layers_per_block": 2,
        },
    ),
    "more levels and other widths": (
        "dual_feature",
        {
            "encoderconfig.ch_mult": [1, 2, 1, 2],
            "decoderconfig.ch_mult": [2, 1, 1],
            "encoderconfig.z_channels": 64,
            "encoderconfig.router_config.num_channels": 64,
            "decoderconfig.in_ch": 64,
            "quant_before_dim": 64,
            "quant_after_dim": 24,
            "vqconfig.codebook_dim": 24,
            "vqconfig.codebook_size": 50,
        }
        | vae_size(16, fine_factor=4)
        | budget_size(2, 4),
        {"granularities": [8, 4], "z_channels": 64, "codebook_dim": 24, "codebook_size": 50},
    ),
    "24 pixels, learned positions": (
        "dual_entropy",
        vae_size(24) | {"image_size": 24, RATIO: 0.25, "decoderconfig.position_type": "learned"},
        {"image_size": 24, "position_type": "learned"},
    ),
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
            "router_gradient": "selected",
        },
    ),
}


def draw(config):
    """The release's model with drawn weights, an image with flat regions, and what the model makes of it."""
    release = Release(config)
    size = release.encoder["resolution"]
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    image[:, :, : size // 2] = image[:, :, :1, :1]
    with torch.no_grad():
        encoded = release.encode(image)
        decoded = release.decode(encoded[3])
    return release.state, image, (*encoded, decoded)


def check_vae(vae, image, results):
    """Compare our tokenizer with what `draw` gives."""
    hidden, routing, grain_map, codes, loss, decoded = results
    with torch.no_grad():
        encoded = vae.encode(image)
        compare("hidden", encoded.hidden_states, hidden)
        compare("routing", encoded.entropy if vae.config.router == "entropy" else encoded.router_logits, routing)
        compare("grain_map", encoded.grain_map, grain_map)
        compare("codes", encoded.codes, codes)
        compare("vq_loss", encoded.loss, loss)
        compare("decoded", vae.decode_codes(encoded.codes).sample, decoded)


@pytest.mark.parametrize("option", VAE_OPTIONS)
def test_other_vae_options_convert(option, tmp_path):
    name, changes, fields = VAE_OPTIONS[option]
    config = changed(name, changes)
    state, image, results = draw(config)
    assert len(results[2].unique()) > 1 and len(results[3].unique()) > 4
    convert_checkpoint(*write(tmp_path / "release", config, state), tmp_path / "ours")
    model = DQVAEModel.from_pretrained(tmp_path / "ours")
    assert {field: getattr(model.config, field) for field in fields} == fields
    check_vae(model, image, results)
    processor = DQImageProcessor.from_pretrained(tmp_path / "ours")
    assert processor.size == dict.fromkeys(("height", "width"), image.shape[-1])


@pytest.mark.parametrize("kind", ["fourier", "learned"])
def test_positions_of_one_kind_may_be_named_without_it(kind, tmp_path):
    config = changed("dual_feature", {"decoderconfig.position_type": kind})
    state, image, results = draw(config)
    state = {key.replace(f"position_bias_{kind}", "position_bias"): value for key, value in state.items()}
    assert not any(f"_{kind}" in key for key in state)
    check_vae(convert_checkpoint(*write(tmp_path / "release", config, state), tmp_path / "ours"), image, results)


FIRST_24 = {f"first_stage_config.{key}": value for key, value in (vae_size(24) | {"image_size": 24}).items()}
TRANSFORMER_OPTIONS = {
    "layers, heads and rates": (
        "transformer_class",
        {
            "transformer_config.position_layer": 3,
            "transformer_config.content_layer": 1,
            "transformer_config.n_head": 8,
            "transformer_config.n_embd": 48,
            "transformer_config.embd_pdrop": 0.0,
            "transformer_config.resid_pdrop": 0.2,
            "transformer_config.attn_pdrop": 0.3,
            "content_loss_weight": 0.5,
            "position_loss_weight": 2,
        },
        {
            "num_position_layers": 3,
            "num_content_layers": 1,
            "num_attention_heads": 8,
            "hidden_size": 48,
            "embedding_dropout": 0.0,
            "residual_dropout": 0.2,
            "attention_dropout": 0.3,
            "content_loss_weight": 0.5,
            "position_loss_weight": 2,
        },
    ),
    "classes and codes": (
        "transformer_class",
        transformer_size(20, 4, 3) | {"first_stage_config.vqconfig.codebook_size": 20},
        {"num_classes": 3, "codebook_size": 20, "content_vocab_size": 25, "position_vocab_sizes": [21, 69]},
    ),
    "shortest stream": ("transformer_uncond", {"transformer_config.block_size": 68}, {"max_stream_length": 68}),
    "24 pixels, region-first": (
        "transformer_class",
        transformer_size(32, 6, 10)
        | FIRST_24
        | {"transformer_config.block_size": 148, "permuter_config.fine_position_order": "region-first"},
        {"grid_sizes": [[6, 6], [12, 12]], "max_stream_length": 148, "fine_order": "region-first"},
    ),
    "feature router": (
        "transformer_uncond",
        {
            "first_stage_config.encoderconfig.router_config": params(load_config("dual_feature"), "encoderconfig")[
                "router_config"
            ],
            "first_stage_config.entropy_patch_size": ...,
            "first_stage_config.image_size": ...,
        },
        {},
    ),
}


def check_generator(model, config, state):
    """Nothing is lost: the weights of our transformer have the sums of the drawn ones, and it samples an image."""
    drawn = [float(value.double().sum()) for key, value in state.items() if key.startswith("transformer.")]
    ours = [float(value.double().sum()) for value in model.transformer.state_dict().values()]
    assert sorted(ours) == pytest.approx(sorted(drawn), abs=1e-6)
    last = params(config, "transformer_config")["position_layer"] - 1
    layer = model.transformer.position_transformer.layers[last]
    assert torch.equal(
        layer.attention.k_proj.weight, state[f"transformer.position_transformer.{last}.attn.key.weight"]
    )


@pytest.mark.parametrize("option", TRANSFORMER_OPTIONS)
def test_other_transformer_options_convert(option, tmp_path):
    name, changes, fields = TRANSFORMER_OPTIONS[option]
    config = changed(name, changes)
    state, image, results = draw(config)
    state |= draw_transformer(config)
    convert_checkpoint(*write(tmp_path / "release", config, state), tmp_path / "ours")
    model = DQForImageGeneration.from_pretrained(tmp_path / "ours")
    assert {field: getattr(model.transformer.config, field) for field in fields} == fields
    check_vae(model.vae, image, results)
    check_generator(model, config, state)
    labels = 2 if model.config.transformer_config.num_classes else None
    generated = model.transformer.generate(labels, do_sample=False)
    assert model.vae.decode_codes(generated.codes).sample.shape == image.shape


# The published layout. Widths are small, and the table is the reference's; everything else is as published.

TABLE = "scripts/tools/thresholds/entropy_thresholds_imagenet_train_patch-16.json"
PUBLISHED_VAE = {
    "encoderconfig.ch_mult": [1, 1, 2, 2, 4],
    "encoderconfig.num_res_blocks": 2,
    "encoderconfig.attn_resolutions": [16, 32],
    "decoderconfig.ch_mult": [1, 1, 2, 2],
    "decoderconfig.num_res_blocks": 2,
    "decoderconfig.attn_resolutions": [32],
    "vqconfig.codebook_size": 1024,
    "vqconfig.restart_unused_codes": True,
} | vae_size(256, fine_factor=8)
PUBLISHED_ENTROPY = PUBLISHED_VAE | {
    "entropy_patch_size": ...,
    "image_size": ...,
    "encoderconfig.router_config.json_path": TABLE,
}
PUBLISHED_GENERATOR = {f"first_stage_config.{key}": value for key, value in PUBLISHED_ENTROPY.items()} | {
    "first_stage_config.ckpt_path": "put the path of your first stage here",
    "transformer_config.block_size": 2048,
    "transformer_config.position_layer": 6,
    "transformer_config.content_layer": 18,
    "transformer_config.n_head": 8,
}
PUBLISHED = {
    "stage1/entropy.yml": ("dual_entropy", PUBLISHED_ENTROPY),
    "stage1/feature.yml": ("dual_feature", PUBLISHED_VAE | budget_size(16, 32)),
    "stage1/triple.yml": (
        "triple_feature",
        PUBLISHED_VAE
        | budget_size(8, 16, 32)
        | {"encoderconfig.ch_mult": [1, 1, 2, 2, 4, 4], "encoderconfig.attn_resolutions": [8, 16, 32]},
    ),
    "stage2/uncond.yml": ("transformer_uncond", PUBLISHED_GENERATOR | transformer_size(1024, 16, 0)),
    "stage2/class.yml": ("transformer_class", PUBLISHED_GENERATOR | transformer_size(1024, 16, 1000)),
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout of the release with its five configurations; (folder, {configuration: what `draw` gives})."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / TABLE).parent.mkdir(parents=True)
    (folder / TABLE).write_text(json.dumps(load_table()))
    drawn = {}
    for name, (reference, changes) in PUBLISHED.items():
        path = folder / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        config = changed(reference, changes)
        path.write_text(yaml.safe_dump(config))
        state, image, results = drawn[name] = draw(config)
        if "stage2" in name:
            state |= draw_transformer(config)
        torch.save({"state_dict": state, "epoch": 1}, path.with_suffix(".ckpt"))
    return folder, drawn


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_convert(name, checkout, tmp_path):
    folder, drawn = checkout
    state, image, results = drawn[name]
    path, lines = folder / "configs" / name, []
    model = convert_checkpoint(path, path.with_suffix(".ckpt"), tmp_path, report=lines.append)
    vae = model.vae if "stage2" in name else model
    check_vae(vae, image, results)
    assert vae.config.grid_sizes[-2:] == [[16, 16], [32, 32]]
    if vae is not model:
        config = model.config.transformer_config
        vocabularies = [config.content_vocab_size, *config.position_vocab_sizes]
        assert vocabularies == ([2026, 1258, 2026] if "class" in name else [1027, 259, 1027])
        check_generator(model, yaml.safe_load(path.read_text()), state)
    if vae.config.router == "entropy":
        for default in ("entropy_patch_size is not in the configuration: 16", "image_size is .*: 256"):
            assert any(re.search(default, line) for line in lines)


@pytest.mark.parametrize(
    ("place", "config"),
    [
        (".", "configs/stage1/entropy.yml"),
        ("configs/stage1", "entropy.yml"),
        ("scripts", "../configs/stage1/entropy.yml"),
    ],
)
def test_the_working_directory_does_not_matter(place, config, checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(checkout[0] / place)
    model = convert_checkpoint(config, Path(config).with_suffix(".ckpt"), tmp_path)
    assert model.config.entropy_thresholds == [load_table()["50"]]


def test_the_table_of_thresholds_is_found_given_or_published(checkout, tmp_path):
    folder, _ = checkout
    checkpoint = folder / "configs" / "stage1" / "entropy.ckpt"
    path, lines = tmp_path / "alone" / "config.yml", []
    path.parent.mkdir()
    (tmp_path / "table.json").write_text('{"50": 1.25}')
    config = changed("dual_entropy", PUBLISHED_ENTROPY)

    def convert(output, **options):
        path.write_text(yaml.safe_dump(config))
        return convert_checkpoint(path, checkpoint, tmp_path / output, report=lines.append, **options).config

    assert convert("published").entropy_thresholds == [1.677775]
    assert any(re.search(r"no file .*imagenet.*1\.677775 nats, the published one", line) for line in lines)
    assert convert("given", thresholds_path=tmp_path / "table.json").entropy_thresholds == [1.25]
    with pytest.raises(FileNotFoundError, match="there is no file .*none.json"):
        convert("none", thresholds_path=tmp_path / "none.json")
    os.symlink(folder / "configs" / "stage1" / "entropy.yml", tmp_path / "link.yml")
    linked = convert_checkpoint(tmp_path / "link.yml", checkpoint, tmp_path / "linked")
    assert linked.config.entropy_thresholds == [load_table()["50"]]

    router = params(config, "encoderconfig", "router_config")
    for ratio, name, published in ((0.25, TABLE, 2.4625628), (0.5, "thresholds_ffhq.json", 1.5459324)):
        router.update(fine_grain_ratito=ratio, json_path=name)
        ours = convert(f"{ratio}")
        assert ours.entropy_thresholds == [published] and ours.budget_targets == [ratio]
    for ratio, name in (
        (0.3, TABLE),
        (0.75, "thresholds_ffhq.json"),
        (0.5, "thresholds.json"),
        (0.5, "/" + 9999 * "x"),
    ):
        router.update(fine_grain_ratito=ratio, json_path=name)
        with pytest.raises(FileNotFoundError, match=r"neither beside it nor .*--thresholds") as error:
            convert("refused")
        assert len(str(error.value)) < 1000
    with pytest.raises(ValueError, match="entropy thresholds were given .* leave them out"):
        convert_checkpoint(
            *reference_paths("dual_feature"), tmp_path / "refused", thresholds_path=tmp_path / "table.json"
        )
    assert not (tmp_path / "refused").exists()


# The output folder


def test_output_is_not_overwritten_without_force(tmp_path):
    vae, both = map(reference_paths, ("dual_entropy", "transformer_class"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="must be a folder"):
        convert_checkpoint(*vae, tmp_path / "file", force=True)
    folder = tmp_path / "ours"
    folder.mkdir()
    convert_checkpoint(*vae, folder)  # an empty folder is fine
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError, match="is not empty; choose another or give --force"):
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
    convert_checkpoint(*reference_paths(old), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with full_disk(100_000), pytest.raises(OSError, match="cannot be written"):
        convert_checkpoint(*reference_paths(new), tmp_path, force=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_no_shard_of_an_old_tokenizer_stays_beside_a_new_model(tmp_path):
    vae = convert_checkpoint(*reference_paths("dual_entropy"), tmp_path / "vae")
    vae.save_pretrained(tmp_path / "ours", max_shard_size="500KB")
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    convert_checkpoint(*reference_paths("transformer_class"), tmp_path / "ours", force=True)
    assert not list((tmp_path / "ours").glob("model*safetensors*"))
    assert (tmp_path / "ours" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["dual_entropy", "transformer_class"])
def test_the_returned_model_is_the_saved_one(name, tmp_path):
    model = convert_checkpoint(*map(str, reference_paths(name)), str(tmp_path / "ours"))
    assert not model.training
    saved = load_model(tmp_path / "ours", name).state_dict()
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    files = {"config.json", "preprocessor_config.json"}
    files |= {"model_index.json", "vae", "transformer"} if name == "transformer_class" else {"model.safetensors"}
    assert files <= names
