"""The commands of `dq-hf`: what they write and print, and that a refused command changes nothing."""

import io
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TEXT, make_text_encoder, make_text_tokenizer, make_transformer, make_vae
from datasets import Dataset
from hub_server import HubServer, run_client
from PIL import Image
from safetensors.torch import load_file, save_file

from dq_hf import DQForImageGeneration, DQImageProcessor, DQInpaintPipeline, DQPipeline, DQVAEModel
from dq_hf.codec import DQTokens, compress, load_rows, read_codes
from dq_hf.commands.main import main
from dq_hf.data.fingerprint import decoding_fingerprint
from dq_hf.hub.card import write_model_card
from dq_hf.loading import load_tokenizer
from dq_hf.modeling.grain_map_dq import expand_grain_map
from dq_hf.modeling.routing_dq import image_entropy
from dq_hf.pictures import draw_grain_map

NAMES = {0: "sun", 1: "moon", 2: "star"}
REFERENCE = Path(__file__).parents[1] / "fixtures" / "reference" / "dual_entropy"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with models for 8x8 images, codes of 4x4 and 2x2 pixels: "conditional", "unconditional", "vae"."""
    root = tmp_path_factory.mktemp("models")
    vae = make_vae(image_size=8, entropy_thresholds=[0.3])
    for name, overrides in (("conditional", dict(num_classes=3, id2label=NAMES)), ("unconditional", {})):
        transformer = make_transformer(grid_sizes=[[2, 2], [4, 4]], **overrides)
        DQForImageGeneration.from_models(vae, transformer).save_pretrained(root / name)
    vae.save_pretrained(root / "vae")
    return root


@pytest.fixture
def place(tmp_path, models, monkeypatch):
    """An own working folder with `model` (conditional), `noise.png` (24 wide, 16 high) and `half.png`."""
    shutil.copytree(models / "conditional", tmp_path / "model")
    noise = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    noise[:, :12] = 255
    Image.fromarray(noise).save(tmp_path / "half.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capfd):
    """Runs a command that must succeed, and gives what it printed."""

    def run(*arguments):
        capfd.readouterr()
        main([str(argument) for argument in arguments])
        return capfd.readouterr()

    return run


@pytest.fixture
def refused(capfd, place):
    """Runs a command that must fail with status 1, one line and no trace on the disk, and gives the line."""

    def refused(*arguments):
        capfd.readouterr()
        before = files_of(place)
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        printed = capfd.readouterr()
        errors = [line for line in re.split("[\r\n]", printed.err) if "error:" in line]
        assert stop.value.code == 1 and printed.out == "" and "Traceback" not in printed.err
        assert len(errors) == 1 and printed.err.endswith(errors[0] + "\n")
        assert errors[0].startswith(f"dq-hf {arguments[0]}: error: ")
        assert files_of(place) == before
        return errors[0]

    return refused


def files_of(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def pixels(image):
    return np.asarray(image.convert("RGB")).astype(int)


def cells(path, columns, count, width=8, height=8):
    """The pictures of a grid, as lists."""
    grid = pixels(Image.open(path))
    return [grid[i // columns * height :, i % columns * width :][:height, :width].tolist() for i in range(count)]


def expected_images(folder, labels, seed, **options):
    pipe = DQPipeline.from_pretrained(folder)
    output = pipe(class_labels=labels, generator=torch.Generator().manual_seed(seed), **options)
    return [pixels(image).tolist() for image in output.images], output.grain_maps


def enlarged(image, scale):
    return np.asarray(image).repeat(scale, 0).repeat(scale, 1)


def test_generate_draws_a_grid_of_every_class_in_turn(run, place):
    printed = run("generate", "--model", "model", "--output", "grid.png")
    assert printed.out == "grid.png\n" and "100%" in printed.err
    assert Image.open("grid.png").size == (32, 32)
    images, _ = expected_images("model", [i % 3 for i in range(16)], seed=0)
    assert cells("grid.png", columns=4, count=16) == images


@pytest.mark.parametrize("command", ["generate", "reconstruct"])
def test_images_are_written_through_links_under_long_names_and_told_of_on_any_terminal(place, monkeypatch, command):
    source = ["generate", "--model", "model", "-n", "1", "--force", "--output"]
    if command == "reconstruct":
        source = ["reconstruct", "noise.png", "--model", "model", "--force"]
    (place / "disk").mkdir()
    name = "\u96ea" * 80 + "12345678.png"  # 252 bytes
    (place / "disk" / "old.png").write_bytes(b"old")
    (place / "link.png").symlink_to("disk/old.png")
    (place / "new link.png").symlink_to(place / "disk" / "new.png")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    for output in ("link.png", "new link.png", name):
        main([*source, output])
    terminal.flush()
    assert (place / "link.png").is_symlink() and (place / "new link.png").is_symlink()
    for path in (place / "disk" / "old.png", place / "disk" / "new.png", place / name):
        assert Image.open(path).size[0] > 0
    assert sorted(path.name for path in (place / "disk").iterdir()) == ["new.png", "old.png"]
    assert command == "reconstruct" or b"\\u96ea" in terminal.buffer.getvalue()


def test_generate_takes_names_and_ids_and_a_seed(run, place):
    run("generate", "--model", "model", "--class-label", "moon", "2", "-n", 3, "--seed", 5, "--output", "a.png")
    images, _ = expected_images("model", ["moon", "star", "moon"], seed=5)
    assert cells("a.png", columns=2, count=4) == [*images, np.full((8, 8, 3), 255).tolist()]
    run("generate", "--model", "model", "--class-label", "1", "star", "-n", 3, "--seed", 5, "--output", "b.png")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_generate_writes_single_files_whatever_the_batch_and_the_lookahead(run, place):
    options = ["--model", "model", "-n", 5, "--seed", 2]
    printed = run("generate", *options, "--output-dir", "new/images", "--batch-size", 2, "--lookahead", 3)
    assert printed.out == "new/images: 5 images\n"
    names = [f"{i:05d}.png" for i in range(5)]
    assert sorted(path.name for path in Path("new/images").iterdir()) == names
    images, _ = expected_images("model", [0, 1, 2, 0, 1], seed=2)
    assert [pixels(Image.open(f"new/images/{name}")).tolist() for name in names] == images


@pytest.fixture(scope="module")
def text_model(models):
    """A folder with a model that takes prompts."""
    parts = make_vae(image_size=8), make_transformer(grid_sizes=[[2, 2], [4, 4]], **TEXT)
    model = DQForImageGeneration.from_models(*parts, make_text_encoder(), make_text_tokenizer())
    model.save_pretrained(models / "text")
    return models / "text"


def test_generate_takes_prompts_in_turn(run, place, text_model):
    prompts = ["a red heart", "", "sun"]
    (place / "prompts.txt").write_text("\n".join(prompts), "utf-8-sig")  # as Windows writes it
    options = ["--model", text_model, "--negative-prompt", "blue", "--guidance-scale", 2, "--seed", 5, "-n", 4]
    run("generate", *options, "--prompts-file", "prompts.txt", "--output", "a.png", "--batch-size", 3)
    given = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    run("generate", *options, *given, "--output", "b.png")
    pipe = DQPipeline.from_pretrained(text_model)
    texts = dict(negative_prompt="blue", guidance_scale=2.0)
    images = pipe([*prompts, "a red heart"], generator=torch.Generator().manual_seed(5), **texts).images
    expected = [pixels(image).tolist() for image in images]
    assert cells("a.png", 2, 4) == cells("b.png", 2, 4) == expected
    run("draw", "order", *options, *given, "--seconds", 0.2, "order.gif")
    (place / "prompts.txt").write_text("sun\n" * 18)
    run("generate", "--model", text_model, "--prompts-file", "prompts.txt", "--output-dir", "many")  # each of them
    assert len(list((place / "many").iterdir())) == 18


def test_generate_refuses_prompts_that_cannot_be(refused, place, text_model):
    (place / "empty.txt").write_text("")
    (place / "bytes.txt").write_bytes(b"\xff\xfe")
    for model, options, message in (
        ("model", ["--prompt", "sun"], "prompt is for a model with text; this one takes class_labels"),
        (text_model, ["--class-label", "sun"], "takes a prompt: it has no classes"),
        (text_model, ["--prompts-file", "empty.txt"], "at least one line"),
        (text_model, ["--prompts-file", "bytes.txt"], "must be a text in UTF-8"),
        (text_model, ["--prompts-file", "none.txt"], "none.txt"),
    ):
        assert message in refused("generate", "--model", model, "--output", "grid.png", *options)


def test_generate_passes_sampling_options_on(run, place):
    options = dict(temperature=0.7, top_k=5, top_p=0.9, position_temperature=1.3, position_top_k=4, position_top_p=0.8)
    options |= dict(fine_positions="free")
    given = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    run("generate", "--model", "model", "-n", 1, *given, "--output", "a.png")
    assert cells("a.png", 1, 1) == expected_images("model", [0], seed=0, **options)[0]


def test_generate_shows_the_coding_beside_each_image(run, place):
    run("generate", "--model", "model", "--output", "grid.png", "--show-grain-map")
    images, grain_maps = expected_images("model", [i % 3 for i in range(16)], seed=0)
    assert set(grain_maps.flatten(1).amax(1).tolist()) == {0, 1}  # with and without a fine region
    pairs = cells("grid.png", columns=4, count=16, width=64, height=32)
    for image, grain_map, pair in zip(images, grain_maps, pairs):
        picture, coding = np.array(pair)[:, :32], np.array(pair)[:, 32:]
        drawn = draw_grain_map(Image.fromarray(np.uint8(image)), grain_map, scale=4)
        assert (picture == enlarged(image, 4)).all() and (coding == pixels(drawn)).all()


def test_generate_samples_an_unconditional_model(run, place, models):
    run("generate", "--model", models / "unconditional", "-n", 3, "--batch-size", 2, "--output-dir", "a")
    pipe = DQPipeline.from_pretrained(models / "unconditional")
    output = pipe(num_images_per_label=3, generator=torch.Generator().manual_seed(0))
    files = [pixels(Image.open(f"a/{i:05d}.png")).tolist() for i in range(3)]
    assert files == [pixels(image).tolist() for image in output.images]


def test_force_overwrites(run, place):
    Path("grid.png").write_text("old")
    run("generate", "--model", "model", "-n", 1, "--output", "grid.png", "--force")
    run("reconstruct", "noise.png", "grid.png", "--model", "model", "--force")
    assert Image.open("grid.png").size == (24, 16)
    assert sorted(path.name for path in place.iterdir()) == ["grid.png", "half.png", "model", "noise.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "half.png"], "half.png exists; choose another name or give --force"),
        (["--output", "no/grid.png"], "no/grid.png cannot be written; its folder must exist"),
        (["--output", "half.png/grid.png"], "half.png/grid.png cannot be written"),
        (["--output", "model.png/"], "must exist|exists"),
        (["--output", "grid"], "grid must end like an image file that holds colours and any size, for example .png"),
        (["--output", "grid.psd"], "grid.psd must end like an image file"),
        (["--output", "grid.xbm"], "grid.xbm must end like an image file that holds colours and any size"),
        (["--output", "grid.ico"], "grid.ico must end like an image file that holds colours and any size"),
        (["--output-dir", "half.png"], "cannot be written"),
        (["--output-dir", "half.png/sub"], "cannot be written"),
        (["--output-dir", "taken"], "taken/00001.png exists"),
        (["--class-label", "mon"], "unknown class 'mon'; did you mean 'moon'"),
        (["--class-label", "sun", "3"], "0 ... 2, got 3"),
        (["--class-label", "-1"], "0 ... 2, got -1"),
        (["--class-label", "²"], "unknown class '²'; known classes: sun, moon, star"),
        (["--seed", "18446744073709551616"], "seed must lie in 0 ... 18446744073709551615, got 18446744073709551616"),
        (["--seed", "-1"], "seed must lie in 0 ... 18446744073709551615, got -1"),
        (["-n", "0"], "--num-images must be at least 1, got 0"),
        (["-n", "1", "--class-label", "sun", "moon"], "-n must be at least 2, for each prompt and class, got 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--lookahead", "0"], "--lookahead must be at least 1, got 0"),
        (["--temperature", "0"], "temperature must be 1e-06 or more"),
        (["--top-p", "1.5"], r"top_p must lie in \(0, 1\], got 1.5"),
        (["--position-top-k", "0"], "position_top_k must be at least 1"),
        (["--guidance-scale", "2"], "class_dropout"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--model", "no-such-model"], "no-such-model is no local folder"),
        (["--model", "./no/such/model"], "no/such/model is no local folder"),
        (["--model", "half.png"], "half.png is no local folder"),
        (
            ["--model", "model/vae"],
            "model/vae has no file model_index.json; a pipeline needs the tokenizer and the gen",
        ),
    ],
)
def test_generate_refuses(refused, place, options, message):
    (place / "model.png").mkdir()
    (place / "taken").mkdir()
    (place / "taken" / "00001.png").write_text("mine")
    arguments = ["--model", "model", "-n", "2", *options]
    if not any(option.startswith("--output") for option in options):
        arguments += ["--output", "grid.png"]
    assert re.search(message, refused("generate", *arguments))


def test_generate_refuses_labels_for_an_unconditional_model(refused, models):
    options = ["--model", models / "unconditional", "--class-label", "sun", "--output-dir", "a"]
    assert "unconditional" in refused("generate", *options)


def test_damaged_models_are_refused_by_file(refused, place):
    path = place / "model" / "vae" / "model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    message = "model/vae/model.safetensors .*not finite: decoder.conv_in.weight"
    assert re.search(message, refused("generate", "--model", "model", "--output", "grid.png"))
    assert re.search(message, refused("reconstruct", "noise.png", "out.png", "--model", "model"))
    path.write_bytes(path.read_bytes()[:-5])
    assert "model/vae/model.safetensors is damaged" in refused("generate", "--model", "model", "--output", "grid.png")


@pytest.mark.parametrize("model", ["model", "vae"])
@pytest.mark.parametrize(
    ("image", "options", "num_fine"),
    [
        ("half.png", [], 12),  # 4 x 6 regions, the left half white
        ("noise.png", ["--fine-ratio", "0"], 0),
        ("noise.png", ["--fine-ratio", "0.25"], 6),
        ("noise.png", ["--fine-ratio", "0.3"], 7),
        ("noise.png", ["--fine-ratio", "1"], 24),
    ],
)
def test_reconstruct_prints_codes_bits_and_psnr(run, place, models, model, image, options, num_fine):
    folder = place / "model" if model == "model" else models / "vae"
    printed = run("reconstruct", image, "out.png", "--model", folder, *options)
    codes = 24 - num_fine + 4 * num_fine
    bits = codes * math.log2(16)
    error = np.square(pixels(Image.open("out.png")) - pixels(Image.open(image))).mean()
    lines = printed.out.splitlines()
    assert lines[0].split() == ["codes", str(codes), "(96", "if", "all", "regions", "were", "fine)"]
    assert lines[1] == f"bits   {bits + 24:.0f} ({bits:.0f} codes + 24 grain map)"
    name, psnr, unit = lines[2].split()
    assert (name, unit) == ("PSNR", "dB") and float(psnr) == pytest.approx(10 * math.log10(255**2 / error), abs=0.05)
    assert len(lines) == 3


def test_reconstruct_is_encode_and_decode(run, place, models):
    run("reconstruct", "half.png", "out.png", "--model", "model", "--fine-ratio", 0.5)
    run("reconstruct", "half.png", "both.png", "--model", "model", "--fine-ratio", 0.5, "--show-grain-map")
    vae = DQVAEModel.from_pretrained(models / "vae")
    pixel_values = torch.from_numpy(pixels(Image.open("half.png"))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        encoded = vae.encode(pixel_values, fine_ratio=0.5)
        sample = vae.decode(encoded.quantized).sample
    expected = ((sample[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0).numpy()
    found, both = pixels(Image.open("out.png")), pixels(Image.open("both.png"))
    assert np.abs(found - expected).max() <= 0.51
    coding = pixels(draw_grain_map(Image.open("half.png"), encoded.grain_map[0]))
    assert (both == np.hstack([coding, enlarged(found, 4)])).all()  # four times as large, two side by side


def test_reconstruct_resizes_to_the_models_size(run, place):
    printed = run("reconstruct", "noise.png", "out.png", "--model", "model", "--resize", "--fine-ratio", 0.5)
    assert Image.open("out.png").size == (8, 8) and printed.out.startswith("codes  10 (16 if")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png", "out.png"], "none.png does not exist"),
        (["text.png", "out.png"], "text.png is damaged, or no image"),
        (["cut.png", "out.png"], "cut.png is damaged"),
        (["cut.qoi", "out.png"], "cut.qoi is damaged, or no image: IndexError"),
        (["model", "out.png"], "model"),
        (["nan.tif", "out.png"], "mode 'F'"),
        (["noise.png", "half.png"], "half.png exists"),
        (["noise.png", "no/out.png"], "no/out.png cannot be written"),
        (["noise.png", "out.txt"], "out.txt must end like an image file"),
        (["odd.png", "out.png"], "multiples of 4, got 10x16; give --resize for 8x8"),
        (["noise.png", "out.png", "--fine-ratio", "1.5"], r"fine_ratio must lie in \[0, 1\]"),
        (["noise.png", "out.png", "--fine-ratio", "nan"], r"fine_ratio must lie in \[0, 1\]"),
        (["noise.png", "out.png", "--fine-ratio", "0.5", "0.2"], r"needs 1 share"),
        (["noise.png", "out.png", "--model", "missing"], "missing is no local folder"),
        (["noise.png", "out.png", "--model", "model/transformer"], "DQVAEConfig"),
        (["noise.png", "out.png", "--device", "cuda:99"], "--device cuda:99 cannot be used"),
    ],
)
def test_reconstruct_refuses(refused, place, arguments, message):
    (place / "text.png").write_text("text")
    whole = (place / "noise.png").read_bytes()
    (place / "cut.png").write_bytes(whole[: len(whole) // 2])
    (place / "cut.qoi").write_bytes(b"qoif" + bytes([0, 0, 0, 8, 0, 0, 0, 8, 3, 0]))  # a header, and no pixels
    Image.fromarray(np.full((16, 24), np.nan, dtype=np.float32)).save("nan.tif")
    Image.open("noise.png").crop((0, 0, 10, 16)).save("odd.png")
    assert re.search(message, refused("reconstruct", "--model", "model", *arguments))


HUB_COMMANDS = """
from dq_hf.codec import DQTokens, compress, load_rows, read_codes
from dq_hf.commands.main import main
from dq_hf.data.fingerprint import decoding_fingerprint
for name in ("vae", "both"):
    main(["reconstruct", "noise.png", f"{name}.png", "--model", f"user/{name}"])
main(["generate", "--output", "grid.png", "--model", "user/vae"])
"""


def test_repositories_serve_like_folders_and_a_generator_is_asked_for_where_it_is_needed(place, models, run):
    with HubServer() as hub:
        hub.add("user/vae", models / "vae")
        hub.add("user/both", models / "conditional")
        done = run_client(hub, HUB_COMMANDS, check=False, cwd=place)
    assert done.stdout == 2 * run("reconstruct", "noise.png", "local.png", "--model", models / "vae").out
    local = pixels(Image.open("local.png"))
    assert all((pixels(Image.open(f"{name}.png")) == local).all() for name in ("vae", "both"))
    message = "dq-hf generate: error: user/vae, revision 'main': .* has no file model_index.json; a pipeline needs"
    assert done.returncode == 1 and re.match(message, done.stderr.splitlines()[-1])
    assert not Path("grid.png").exists()


def test_convert_writes_a_folder_that_loads(run, place):
    Path("table.json").write_text('{"50": 1.118127}')
    arguments = ["--config", REFERENCE / "config.yml", "--checkpoint", REFERENCE / "model.ckpt"]
    printed = run("convert", *arguments, "--output", "converted", "--thresholds", "table.json")
    model = DQVAEModel.from_pretrained("converted")
    *defaults, last = printed.out.splitlines()
    assert last == f"converted: DQVAEModel, {sum(p.numel() for p in model.parameters()):,} parameters"
    assert (
        "model.params.decoderconfig.params.dropout is not in the configuration: 0.0, the release's default" in defaults
    )
    assert model.router.thresholds.tolist() == pytest.approx([1.118127])
    expected = load_file(REFERENCE / "expected.safetensors")
    with torch.no_grad():
        encoded = model.encode(expected["image"])
    assert torch.equal(encoded.codes, expected["codes"]) and torch.equal(encoded.grain_map, expected["grain_map"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.yml", "--checkpoint", "noise.png", "--output", "new"], "none.yml"),
        (["--config", REFERENCE / "config.yml", "--checkpoint", "noise.png", "--output", "new"], "noise.png"),
        (["--config", REFERENCE / "config.yml", "--checkpoint", "none.ckpt", "--output", "new"], "none.ckpt"),
        (
            ["--config", REFERENCE / "config.yml", "--checkpoint", REFERENCE / "model.ckpt", "--output", "model"],
            "model",
        ),
    ],
)
def test_convert_refuses(refused, arguments, message):
    assert message in refused("convert", *arguments)


@pytest.mark.parametrize("prior", [[], ["--prior", "generator", "--class-label", "1"]])
def test_compress_and_decompress_give_what_reconstruct_gives(run, place, prior):
    Image.open("noise.png").crop((0, 0, 8, 8)).save("small.png")
    printed = run("compress", "small.png", "small.dq", "--model", "model", "--fine-ratio", 0.5, *prior).out
    length = (place / "small.dq").stat().st_size
    assert f"bytes  {length} " in printed and ("generator" if prior else "static") in printed
    assert f"bits   {length / 8:.3f} a pixel" in printed
    run("decompress", "small.dq", "back.png", "--model", "model")
    run("reconstruct", "small.png", "expected.png", "--model", "model", "--fine-ratio", 0.5)
    assert np.array_equal(pixels(Image.open("back.png")), pixels(Image.open("expected.png")))


def test_compress_and_decompress_take_any_size_and_number_of_bytes(run, place):
    Image.open("noise.png").crop((0, 0, 23, 13)).save("odd.png")
    run("compress", "odd.png", "odd.dq", "--model", "model/vae", "--max-bytes", 40)
    assert (place / "odd.dq").stat().st_size <= 40
    assert "23x13" in run("decompress", "odd.dq", "odd.png", "--model", "model", "--force").out


def test_compress_and_decompress_refuse_what_cannot_be(refused, run):
    assert "at least" in refused("compress", "noise.png", "noise.dq", "--model", "model", "--max-bytes", 1)
    assert "does not exist" in refused("compress", "nothing.png", "noise.dq", "--model", "model")
    assert "generator" in refused("compress", "noise.png", "noise.dq", "--model", "model", "--class-label", "sun")
    run("compress", "noise.png", "noise.dq", "--model", "model")
    assert "--force" in refused("compress", "noise.png", "noise.dq", "--model", "model")
    for place in ("-", "/dev/null"):
        assert "an ordinary file" in refused("compress", "noise.png", place, "--model", "model", "--force")
    assert re.search("another model.*; give the model that wrote it", refused("decompress", "noise.dq", "back.png"))
    assert "begin with DQ" in refused("decompress", "noise.png", "back.png")
    assert "nothing.dq" in refused("decompress", "nothing.dq", "back.png")


@pytest.fixture
def pictures(place):
    """A folder of images of three sizes, two of them no whole regions, one in a folder of its own; and what is no image."""
    sizes = {"a.png": (8, 8), "b.png": (8, 8), "c/d.png": (9, 13), "e.png": (8, 8), "f.png": (12, 12)}
    for name, (width, height) in sizes.items():
        path = place / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open("noise.png").crop((0, 0, width, height)).save(path)
    (place / "pictures" / "notes.txt").write_text("of a walk")
    return sizes


def test_encode_writes_a_row_for_each_image_of_any_size(run, place, pictures):
    printed = run("encode", "pictures", "--output", "codes.parquet", "--model", "model", "--fine-ratio", 0.5)
    assert printed.out == "codes.parquet: 5 images\n"
    vae = DQVAEModel.from_pretrained("model/vae")
    rows = list(load_rows("codes.parquet", vae))
    assert {row["file_name"]: (row["width"], row["height"]) for row in rows} == pictures
    tokens = DQTokens(vae.config)
    for row, back in zip(rows, tokens.from_tokens(tokens.to_tokens(rows)), strict=True):
        data = compress(vae, Image.open(Path("pictures", row["file_name"])), fine_ratio=0.5)
        for found in ({name: torch.tensor(row[name])[None] for name in ("codes", "grain_map")}, back):
            expected = read_codes(vae, data)
            assert torch.equal(found["codes"], expected[0]) and torch.equal(found["grain_map"], expected[1])


def test_encode_resizes_to_the_models_size(run, place, pictures):
    run("encode", "pictures", "--output", "codes.parquet", "--model", "model", "--resize")
    vae = DQVAEModel.from_pretrained("model/vae")
    rows = load_rows("codes.parquet", vae)
    assert {(row["height"], row["width"]) for row in rows} == {tuple(vae.config.image_height_width)}
    assert len(rows) == len(pictures)


def test_encode_names_the_model_and_only_that_decodes(run, place, pictures):
    run("encode", "pictures", "--output", "codes.parquet", "--model", "model")
    vae = DQVAEModel.from_pretrained("model/vae")
    model = json.loads(pq.read_schema("codes.parquet").metadata[b"dq_hf.model"])
    names = {"model": "model", "granularities": [4, 2], "codebook_size": 16}
    assert model == {"fingerprint": decoding_fingerprint(vae)} | names
    with torch.no_grad():
        vae.post_quant_conv.bias += 1
    with pytest.raises(ValueError, match=f"codes.parquet .* another model: fingerprint {model['fingerprint']}, model"):
        load_rows("codes.parquet", vae)
    table = pq.read_table("codes.parquet")
    pq.write_table(table.replace_schema_metadata(), "nameless.parquet")
    for number, damaged in enumerate(("{", "[]", "{}", '{"fingerprint": "0"}')):
        pq.write_table(table.replace_schema_metadata({"dq_hf.model": damaged}), f"{number}.parquet")
    Dataset.from_parquet("codes.parquet").to_parquet("again.parquet")
    for name, message in (
        ("nameless.parquet", "does not name its model: .* by datasets.Dataset.from_parquet"),
        ("again.parquet", "does not name its model: .* by datasets.Dataset.from_parquet"),
        ("noise.png", "is damaged, or no Parquet file"),
        *((f"{number}.parquet", "names its model in another way") for number in range(4)),
    ):
        with pytest.raises(ValueError, match=f"{name} {message}"):
            load_rows(name, vae)
    with pytest.raises(OSError, match="nothing.parquet"):
        load_rows("nothing.parquet", vae)


def test_encode_skips_and_names_a_stated_share_of_broken_images(run, refused, place, pictures, caplog):
    (place / "pictures" / "b.png").write_bytes(b"")
    options = ("encode", "pictures", "--output", "codes.parquet", "--model", "model")
    assert re.search(r"at most 1.00% .* got 1 of 5, the first: .*b.png", refused(*options))
    assert run(*options, "--max-broken-share", 0.2).out == "codes.parquet: 4 images\n"
    assert any("b.png" in record.getMessage() for record in caplog.records)
    assert "--force" in refused(*options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["pictures", "--output", "codes.csv"], "must end in .parquet"),
        (["none", "--output", "codes.parquet"], "must be a folder of images; for Parquet files"),
        (
            ["empty", "--output", "codes.parquet"],
            "must hold images, such as .png or .jpg files; it has none. For Parquet",
        ),
        (
            ["--data", "pictures", "--output", "codes.parquet"],
            "a table takes a folder: dq-hf encode FOLDER --output ...",
        ),
        (["pictures", "--output_dir", "codes"], "with --output_dir the images are given by --data pictures"),
        (["pictures", "--output", "codes.parquet", "--fine-ratio", "2"], "[0, 1]"),
        (["pictures", "--output", "codes.parquet", "--output_dir", "codes"], "not both"),
    ],
)
def test_encode_refuses(refused, place, pictures, options, message):
    (place / "empty").mkdir()
    assert message in refused("encode", *options)


@pytest.fixture
def photographs(place):
    """A folder of eight images 16x16, from plain to noise; no two regions have the same entropy."""
    (place / "photographs").mkdir()
    source = np.random.default_rng(1)
    for i in range(8):
        image = source.normal(128, 6 * (i + 1), (16, 16, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(image).save(place / "photographs" / f"{i}.png")
    return place / "photographs"


@pytest.mark.parametrize("kind", ["model", "vae", "feature"])
@pytest.mark.parametrize("share", [0.25, 0.6])
def test_calibrate_changes_the_thresholds_to_the_wanted_share(run, place, models, photographs, kind, share):
    if kind == "vae":
        shutil.copytree(models / "vae", place / "vae")
    if kind == "feature":
        make_vae(image_size=8, router="feature").save_pretrained("feature")
    printed = run("calibrate", "--data", "photographs", "--model", kind, "--fine-ratio", share)
    lines = [line.split() for line in printed.out.splitlines()]
    assert [line[0] for line in lines] == ["thresholds", "achieved", "written"] and lines[1][-2:] == ["8", "images"]
    assert ("nats" in lines[0]) == (kind != "feature")
    assert float(lines[1][1]) == pytest.approx(share, abs=1 / 32)
    vae = DQForImageGeneration.from_pretrained(kind).vae if kind == "model" else DQVAEModel.from_pretrained(kind)
    assert float(lines[0][1]) == pytest.approx(vae.router.thresholds.item(), abs=1e-6)
    images = [Image.open(path) for path in photographs.iterdir()]
    with torch.no_grad():  # at the model's own size: 8 images of 2 x 2 regions
        grain_map = vae.encode(DQImageProcessor(size={"height": 8, "width": 8})(images)["pixel_values"]).grain_map
    assert grain_map.float().mean().item() == pytest.approx(share, abs=0.5 / 32 + 1e-6)


@pytest.mark.parametrize(
    ("granularities", "budget"), [([4, 2], [0.25]), ([4, 2, 1], [0.25, 0.5])], ids=["two", "three"]
)
def test_calibrate_keeps_the_budget_unless_told_another(run, place, photographs, granularities, budget):
    make_vae(image_size=8, granularities=granularities, budget_targets=budget).save_pretrained("budgeted")
    printed = run("calibrate", "--data", "photographs", "--model", "budgeted")
    (achieved,) = (line.split()[1:-6] for line in printed.out.splitlines() if line.startswith("achieved"))
    assert [float(share) for share in achieved] == pytest.approx(budget, abs=1 / 32)
    assert load_tokenizer("budgeted").config.budget_targets == budget


@pytest.mark.parametrize("kind", ["model", "vae"])
def test_after_calibrating_the_card_claims_no_figure_and_training_goes_on_with_the_share(
    run, place, photographs, kind
):
    model = DQForImageGeneration.from_pretrained("model")
    parts = model.parts if kind == "model" else {"": model.vae}
    config = model.config if kind == "model" else model.vae.config
    shutil.rmtree(place / kind, ignore_errors=True)
    (model if kind == "model" else model.vae).save_pretrained(kind)
    write_model_card(kind, config, parts, title="Trained", test_split="test", metrics={"psnr": 27.62})
    assert "27.62 dB" in (place / kind / "README.md").read_text()
    run("calibrate", "--data", "photographs", "--model", kind, "--fine-ratio", 0.25)
    card = (place / kind / "README.md").read_text()
    claimed, origin = card.split("## Origin", 1)
    assert "27.62 dB" not in claimed and "no longer those of Trained" in origin
    vae = load_tokenizer(kind)
    assert vae.config.budget_targets == [0.25]
    (place / kind / "README.md").write_text("# My own words\n")
    run("calibrate", "--data", "photographs", "--model", kind, "--fine-ratio", 0.5)
    assert (place / kind / "README.md").read_text() == "# My own words\n"


def test_calibrate_reads_a_stream_alike(run, place, photographs):
    stored = run("calibrate", "--data", "photographs", "--model", "model").out
    assert run("calibrate", "--data", "photographs", "--model", "model", "--streaming").out == stored


def test_calibrate_skips_and_names_a_stated_share_of_broken_images(run, place, photographs, caplog):
    (photographs / "3.png").write_bytes(b"")
    printed = run("calibrate", "--data", "photographs", "--model", "model", "--max-broken-share", "0.125")
    assert "of the regions of 7 images\n" in printed.out
    assert any("3.png" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no-such-model"], "local folder with a config.json, got no-such-model"),
        (["--model", "model/transformer"], "has model_type 'dqvae', got 'dqtransformer'"),
        (["--model", "plain"], "a router that chooses"),
        (["--fine-ratio", "1.5"], r"\[0, 1\]"),
        (["--fine-ratio", "0.2", "0.3"], "needs 1 share"),
        (["--split", "test"], "no split 'test'; it has train"),
        (["--image-column", "picture"], "no column 'picture'; it has image"),
        (["--data", "empty"], "empty"),
        (["--max-broken-share", "2"], r"\[0, 1\], got 2.0"),
    ],
)
def test_calibrate_refuses(refused, place, photographs, options, message):
    (place / "empty").mkdir()
    make_vae(granularities=[4]).save_pretrained(place / "plain")
    assert re.search(message, refused("calibrate", "--data", "photographs", "--model", "model", *options))


def test_a_damaged_image_stops_the_calibration(refused, place, photographs):
    path = photographs / "3.png"
    path.write_bytes(path.read_bytes()[:200])
    message = refused("calibrate", "--data", "photographs", "--model", "model")
    assert re.search(r"at most 1.00% .* got 1 of 8, the first: .*3.png", message)


@pytest.mark.parametrize("kind", ["model", "vae"])
def test_train_router_writes_a_tokenizer_whose_router_is_new_and_keeps_its_budget(
    run, place, models, photographs, kind
):
    shutil.copytree(models / "vae", place / "vae")
    for folder in {"vae", kind}:
        (place / folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Old\n")
    options = ["--model", kind, "--data", "photographs", "--batch-size", 4, "--steps", 3]
    printed = run("train-router", *options, "--fine-ratio", 0.25, "--output", "new")
    lines = [line.split() for line in printed.out.splitlines()]
    assert [line[0] for line in lines] == ["thresholds", "achieved", "written"] and lines[1][-2:] == ["8", "images"]
    assert float(lines[1][1]) == pytest.approx(0.25, abs=1 / 32)
    learned, before = DQVAEModel.from_pretrained("new"), DQVAEModel.from_pretrained("vae")
    assert learned.config.router == "gain" and learned.config.budget_targets == [0.25]
    assert learned.router.thresholds.item() == pytest.approx(float(lines[0][1]), abs=1e-6)
    for name, value in before.state_dict().items():
        assert name.startswith("router.") or torch.equal(learned.state_dict()[name], value)
    card = (place / "new" / "README.md").read_text()
    assert "no longer those of" in card and "Licence: cc-by-4.0" in card
    assert run("train-router", *options, "--fine-ratio", 0.25, "--output", "again").out == printed.out.replace(
        "new", "again"
    )
    run("reconstruct", "noise.png", "coded.png", "--model", "new", "--resize")
    budget = run("train-router", *options, "--output", "budget", "--seed", 1).out.splitlines()
    assert float(budget[1].split()[1]) == pytest.approx(0.5, abs=1 / 32)
    assert budget[0] != printed.out.splitlines()[0]


def test_train_router_reads_a_stream_too(run, place, photographs):
    options = ["--model", "model", "--data", "photographs", "--batch-size", 4, "--steps", 5, "--output", "new"]
    assert "of the regions of 8 images\n" in run("train-router", *options, "--streaming").out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "plain"], "one granularity has nothing to route"),
        (["--fine-ratio", "1.5"], r"\[0, 1\]"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--seed", "-1"], "seed"),
        (["--output", "model"], "the output folder model is not empty; choose another$"),
        (["--output", "noise.png"], "must be a folder, got the file noise.png"),
        (["--data", "empty"], "empty"),
    ],
)
def test_train_router_refuses(refused, place, photographs, options, message):
    (place / "empty").mkdir()
    make_vae(granularities=[4]).save_pretrained(place / "plain")
    command = ["train-router", "--model", "model", "--data", "photographs", "--output", "new", "--steps", "1"]
    assert re.search(message, refused(*command, *options))


def test_draw_order_shows_the_codes_coming_and_then_the_images_of_generate(run, place):
    options = ["--model", "model", "--class-label", "moon", "star", "-n", 2, "--seed", 3]
    printed = run("draw", "order", "order.gif", *options, "--seconds", 0.8)
    images, grain_maps = expected_images("model", ["moon", "star"], seed=3)
    codes = (4**grain_maps).flatten(1).sum(1)
    assert printed.out == f"order.gif: 2 images of {codes[0]}, {codes[1]} codes\n"
    with Image.open("order.gif") as animation:
        frames, durations = [], []
        for number in range(animation.n_frames):
            animation.seek(number)
            frames.append(pixels(animation))
            durations.append(animation.info["duration"])
    assert 2 < len(frames) <= 11 and sum(durations) == 800 + 2000 and durations[-1] == 2000
    margin, side = 4, 32  # cells of the fine grid have 8 pixels
    for number, image in enumerate(images):
        left = margin + number * (side + 2 * margin)
        finished = frames[-1][margin : margin + side, left : left + side]
        assert np.abs(finished - enlarged(image, 4)).mean() < 4  # 256 colours
    grey = [(np.abs(frame - 226).max(2) < 3).sum() for frame in frames]
    assert grey[0] > 1000 and grey[-2] < 50 and all(later <= earlier + 50 for earlier, later in zip(grey, grey[1:]))


@pytest.mark.parametrize("router, name", [("feature", "log odds of finer codes"), ("gain", "predicted gain")])
def test_draw_router_draws_the_scores_that_it_goes_by(run, place, router, name):
    vae = make_vae(router=router)
    vae.save_pretrained("tokenizer")
    images = torch.from_numpy(pixels(Image.open("half.png"))).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        scores, codes = vae.region_scores(images), int(vae.encode(images).num_codes)
    printed = run("draw", "router", "half.png", "map.png", "--model", "tokenizer").out.splitlines()
    figures = re.fullmatch(rf"{name}  (\S+) \.\.\. (\S+), mean (\S+)", printed[0]).groups()
    expected = [float(value) for value in (scores.min(), scores.max(), scores.mean())]
    assert list(map(float, figures)) == pytest.approx(expected, abs=0.002)
    assert printed[1].split() == ["codes", str(codes)]


def test_draw_router_leaves_thresholds_that_no_score_reaches_out_of_the_scale(run, place):
    vae = make_vae(router="gain")
    vae.save_pretrained("tokenizer")
    run("draw", "router", "half.png", "0.png", "--model", "tokenizer", "--fine-ratio", 0)
    vae.router.set_thresholds([2e6])  # as after a calibration to a share of 0
    vae.save_pretrained("none")
    run("draw", "router", "half.png", "none.png", "--model", "none")
    assert np.array_equal(pixels(Image.open("none.png")), pixels(Image.open("0.png")))


def test_draw_router_of_an_entropy_router_says_nats(run, place):
    printed = run("draw", "router", "half.png", "map.png", "--model", "model").out.splitlines()
    entropy = image_entropy(torch.from_numpy(pixels(Image.open("half.png"))).permute(2, 0, 1)[None] / 127.5 - 1, 4)
    figures = re.fullmatch(r"entropy, nats  (\S+) \.\.\. (\S+), mean (\S+)", printed[0]).groups()
    expected = [float(value) for value in (entropy.min(), entropy.max(), entropy.mean())]
    assert list(map(float, figures)) == pytest.approx(expected, abs=0.002)
    assert printed[1].split() == ["codes", str(12 + 4 * 12)]  # the left half is white
    assert Image.open("map.png").size == (1100, 60 + round(320 * 16 / 24))


def test_draw_usage_counts_each_code_once(run, place, photographs, models):
    Image.new("RGB", (16, 16), "white").save(photographs / "plain.png")
    printed = run("draw", "usage", "usage.png", "--model", models / "vae", "--data", photographs, "--split", "train")
    images = DQImageProcessor(size={"height": 8, "width": 8})([Image.open(path) for path in photographs.iterdir()])
    with torch.no_grad():
        encoded = DQVAEModel.from_pretrained(models / "vae").encode(images["pixel_values"])
    fine = expand_grain_map(encoded.grain_map, 2).bool()
    uses = {"4x4": encoded.codes[:, ::2, ::2][~fine[:, ::2, ::2]], "2x2": encoded.codes[fine]}
    uses = {name: codes.tolist() for name, codes in uses.items()}
    assert uses["4x4"] and uses["2x2"]
    lines = printed.out.splitlines()
    assert lines[0].split() == ["images", "9"]
    for line, (name, codes) in zip(lines[1:], (uses | {"all": uses["4x4"] + uses["2x2"]}).items()):
        shares = np.unique(codes, return_counts=True)[1] / len(codes)
        perplexity = np.exp(-(shares * np.log(shares)).sum())
        text = f"{len(shares)} of 16 codes, used {len(codes)} times, perplexity {perplexity:.1f}"
        assert line.split(maxsplit=1) == [name, text]
    assert Image.open("usage.png").size == (900, 600)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["order", "order.png"], r"order.png must end in .gif or .webp"),
        (["order", "taken.gif"], "taken.gif exists; choose another name or give --force"),
        (["order", "no/order.gif"], "no/order.gif cannot be written"),
        (["order", "order.gif", "--seconds", "0"], "--seconds must be above 0 and at most 600, got 0.0"),
        (["order", "order.gif", "-n", "0"], "--num-images must be at least 1, got 0"),
        (["order", "order.gif", "--class-label", "mon"], "unknown class 'mon'"),
        (["router", "none.png", "out.png"], "none.png does not exist"),
        (["router", "noise.png", "half.png"], "half.png exists"),
        (["router", "odd.png", "out.png"], "multiples of 4, got 10x16"),
        (["usage", "out.png", "--data", "photographs"], "no split 'test'; it has train"),
        (["usage", "half.png", "--data", "photographs"], "half.png exists"),
        (["usage", "out.txt", "--data", "photographs"], "out.txt must end like an image file"),
        (["usage", "out.png", "--data", "photographs", "--split", "train", "--device", "cuda:99"], "cannot be used"),
    ],
)
def test_draw_refuses(refused, place, photographs, arguments, message):
    (place / "taken.gif").write_text("mine")
    Image.new("RGB", (10, 16)).save(place / "odd.png")
    assert re.search(message, refused("draw", *arguments, "--model", "model"))


@pytest.mark.parametrize("arguments", [["router", "noise.png", "out.png"], ["usage", "out.png", "--data", "gone"]])
def test_figures_without_matplotlib_are_refused_before_the_work(refused, monkeypatch, arguments):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install -c constraints.txt -e ".[draw]"' in refused("draw", *arguments, "--model", "model")


# Edit


def test_edit_draws_again_what_the_mask_touches(place, run):
    image = Image.open(place / "noise.png").crop((0, 0, 8, 8))
    image.save(place / "image.png")
    mask = Image.new("L", (8, 8))
    mask.putpixel((5, 1), 255)
    mask.save(place / "mask.png")
    options = ["--mask", "mask.png", "--model", "model", "--class-label", "moon", "--seed", "3"]
    said = run("edit", "image.png", "edited.png", *options).out
    pipe = DQInpaintPipeline.from_pretrained(place / "model")
    arguments = dict(image=image, mask_image=mask, class_labels="moon")
    output = pipe(**arguments, generator=torch.Generator().manual_seed(3))
    assert (np.asarray(Image.open("edited.png")) == np.asarray(output.images[0])).all()
    assert said == f"edited.png: 1 of 4 regions drawn again, {int((4**output.grain_maps).sum())} codes\n"
    run("edit", "noise.png", "resized.png", "--mask", "noise.png", *options[2:], "--resize")
    assert Image.open("resized.png").size == (8, 8)
    several = ["-n", "2", "--num-candidates", "3", "--no-overlay", "--temperature", "0.5", "--lookahead", "4"]
    run("edit", "image.png", "edited.png", *options, *several, "--force")
    output = pipe(
        **arguments | dict(class_labels=["moon", "moon"]),
        num_candidates=3,
        overlay=False,
        temperature=0.5,
        generator=torch.Generator().manual_seed(3),
    )
    assert (np.asarray(Image.open("edited.png")) == np.hstack([np.asarray(each) for each in output.images])).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mask", "missing.png", "--class-label", "moon"], "missing.png does not exist"),
        (["--mask", "text.png", "--class-label", "moon"], "text.png is damaged, or no image"),
        (["--mask", "noise.png"], "say which by --class-label"),
        (["--mask", "noise.png", "--class-label", "moon"], "edits images of 8x8 pixels, got 24x16; give --resize"),
        (["--mask", "black.png", "--class-label", "moon", "--resize"], "touches no region"),
        (
            ["--mask", "small.png", "--class-label", "moon", "--resize"],
            "must have the image's size, 24x16 pixels; got 8x8",
        ),
        (
            ["--mask", "noise.png", "--class-label", "moon", "--num-candidates", "0"],
            "--num-candidates must be at least 1",
        ),
        (
            ["--mask", "noise.png", "--class-label", "moon", "--lookahead", "0"],
            "--lookahead must be at least 1, got 0",
        ),
    ],
)
def test_edit_refuses(place, capsys, options, message):
    (place / "text.png").write_text("no image")
    Image.new("L", (24, 16)).save(place / "black.png")
    Image.new("L", (8, 8)).save(place / "small.png")
    with pytest.raises(SystemExit):
        main(["edit", "noise.png", "out.png", "--model", "model", *options])
    assert message in capsys.readouterr().err
    assert not (place / "out.png").exists()
