"""The demo's page without a browser: what it shows, what it refuses, and that visitors wait their turn."""

import itertools
import json
import math
import os
import re
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import gradio as gr
import httpx
import numpy as np
import pytest
import torch
from conftest import TEXT, make_text_encoder, make_text_tokenizer, make_transformer, make_vae
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from served_page import enlarged, free_port, opened, pixels, psnr, start, stop, table

from dq_hf import DQForImageGeneration, DQImageProcessor, DQInpaintPipeline, DQPipeline
from dq_hf.commands.main import main
from dq_hf.demo import page as demo_page
from dq_hf.demo.checks import read_upload
from dq_hf.demo.components import add_condition, served
from dq_hf.demo.page import launch, make_page
from dq_hf.demo.views import (
    edit_painted,
    painted_detail,
    painted_regions,
    reconstruct_painted,
    sample_frames,
)
from dq_hf.loading import load_models

ROOT = Path(__file__).parents[2]
CLASSES = dict(num_classes=3, id2label={0: "sun", 1: "moon", 2: "star"}, class_dropout=0.2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders with models for 16x16 images: "conditional", "unconditional", "vae"."""
    root = tmp_path_factory.mktemp("models")
    vae = make_vae(entropy_thresholds=[1.0])
    for name, options in (("conditional", CLASSES), ("unconditional", {})):
        DQForImageGeneration.from_models(vae, make_transformer(**options)).save_pretrained(root / name)
    vae.save_pretrained(root / "vae")
    return root


@pytest.fixture(scope="module")
def loaded(models):
    """Tokenizer and pipeline of the class-conditional model."""
    return load_models(models / "conditional")


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """Serves pages, and gives their addresses."""
    pages = []
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))

    def serving(page):
        pages.append(page)
        return launch(page, port=free_port())

    yield serving
    for page in pages:
        page.close()
    del os.environ["GRADIO_TEMP_DIR"]


@pytest.fixture(scope="module")
def address(loaded, serving):
    """Of the class-conditional model's page."""
    return serving(make_page(*loaded))


@pytest.fixture
def photo(tmp_path):
    """A file with a picture of another shape than the model's."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    noise[:, :20] //= 32
    Image.fromarray(noise).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def visitor(address):
    return Client(address, verbose=False, download_files=False)  # they lie on this very disk


def directly(pipe, label, seed, **options):
    return pipe(class_labels=label, generator=torch.Generator().manual_seed(seed), **options).images[0]


SAMPLING = dict(guidance=1.5, temperature=0.9, position_temperature=1.2, top_p=0.8, painting=None)
OPTIONS = dict(guidance_scale=1.5, temperature=0.9, position_temperature=1.2, top_p=0.8)


def test_a_seed_gives_the_image_of_the_pipeline(loaded, address):
    client = visitor(address)
    image, coding, order, figures, strip = client.predict(1, 7, *SAMPLING.values(), api_name="/sample")
    expected = directly(loaded[1], 1, 7, **OPTIONS)
    assert (pixels(opened(image)) == enlarged(expected, 24)).all()  # 384 pixels wide
    output = loaded[1](class_labels=1, generator=torch.Generator().manual_seed(7), **OPTIONS)
    num_codes = int((4**output.grain_maps).sum())
    assert f"| {num_codes} of at most 64 | {num_codes * 4 + 16} ({num_codes * 4} codes + 16 grain map) |" in figures
    assert (pixels(opened(strip))[:, -128:] == enlarged(expected, 8)).all()
    assert pixels(opened(coding)).shape == pixels(opened(order)).shape == (384, 384, 3)


def expected_order(pipe, label, seed):
    """After how many steps each fine cell has its code, from the finished stream, element by element."""
    transformer = pipe.transformer
    generated = transformer.generate([label], generator=torch.Generator().manual_seed(seed))
    order, granularity = np.full((8, 8), -1), 0
    stream = zip(generated.positions[0].tolist(), generated.contents[0].tolist())
    for step, (position, content) in enumerate(stream):
        side = 2 - granularity
        if content < 16:
            row, column = divmod(position, 8 // side)
            order[row * side : (row + 1) * side, column * side : (column + 1) * side] = step - 1  # 0: behind the start
        granularity += content == 17
    return order


def test_frames_show_the_codes_that_came_so_far_in_the_order_in_which_they_came(loaded):
    _, pipe = loaded
    frames = list(sample_frames(pipe, 2, 3, num_frames=1000))
    order = expected_order(pipe, 2, 3)
    assert len(frames) == order.max() + 3  # one for each element behind the start token, and the finished image
    for frame in frames:
        todo = order > frame.num_steps - 1
        for picture, side in ((frame.image, 2), (frame.coding, 48), (frame.order, 48)):
            inner = pixels(picture).reshape(8, side, 8, side, 3)[:, side // 2, :, side // 2]
            assert ((inner == 226).all(-1) >= todo).all()
            assert not (inner[~todo] == 226).all(-1).any() or picture is frame.image
    brightness = pixels(frames[-1].order)[24::48, 24::48].sum(-1)
    order_of_brightness = [np.unique(grid, return_inverse=True)[1] for grid in (brightness, order)]
    assert (order_of_brightness[0] == order_of_brightness[1]).all()
    assert (pixels(frames[-1].image) == pixels(directly(pipe, 2, 3))).all()


def test_a_file_that_a_visitor_may_be_reading_is_not_written_again(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    path = Path(served(image))
    assert (pixels(Image.open(path)) == pixels(image)).all()
    path.write_bytes(b"")
    assert served(image) == str(path) and path.read_bytes() == b""


def test_no_component_writes_a_picture_itself(address, photo, monkeypatch):
    """Or it writes over a file of equal content, which another visitor may be reading."""
    monkeypatch.setattr(gr.processing_utils, "save_pil_to_cache", None)
    client = visitor(address)
    assert len(client.predict(1, 7, *SAMPLING.values(), api_name="/sample")) == 5
    assert client.predict(handle_file(photo), api_name="/open")["background"]
    assert client.predict(None, True, 0.5, api_name="/reconstruct")[0]
    client.predict(handle_file(photo), api_name="/open_to_edit")
    layer = handle_file(save(photo.parent / "layer.png", painted_over((1, 2))))
    assert client.predict(EMPTY | {"layers": [layer]}, 1, 7, 1.5, 2, api_name="/edit")[0]


def test_about_as_many_frames_as_asked(loaded):
    counts = [len(list(sample_frames(loaded[1], 0, seed, num_frames=6))) for seed in range(3)]
    assert all(2 <= count <= 8 for count in counts)


def test_a_region_counts_as_painted_from_a_tenth_on():
    alpha = np.zeros((80, 120), dtype=np.uint8)
    alpha[:40, 40:80] = 255  # all of region (0, 1)
    alpha[40:45, :40] = 255  # 12.5 % of (1, 0)
    alpha[40:43, 80:] = 255  # 7.5 % of (1, 2)
    layer = Image.merge("RGBA", [Image.new("L", (120, 80))] * 3 + [Image.fromarray(alpha)])
    found = painted_regions({"layers": [Image.new("RGBA", (120, 80)), layer]}, (2, 3))
    assert found.tolist() == [[False, True, False], [True, False, False]]
    for nothing in (None, {"layers": None}, {"layers": []}):
        assert not painted_regions(nothing, (2, 3)).any()


@torch.no_grad()
def test_painted_regions_get_the_finest_codes_and_their_own_psnr():
    vae = make_vae(granularities=[8, 4, 2], block_out_channels=[8, 8, 16, 16], image_size=32)
    pixel_values = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    layer = Image.new("RGBA", (320, 320))
    layer.paste((255, 0, 0, 255), (80, 0, 160, 160))  # regions (0, 1) and (1, 1)
    view = reconstruct_painted(vae, pixel_values, {"layers": [layer]}, [0.25, 0.125])

    chosen = vae.encode(pixel_values, fine_ratio=[0.25, 0.125]).grain_map
    prescribed = chosen.clone()
    prescribed[0, :2, 1] = 2
    for row, grain_map in zip(table(view.figures), (chosen, prescribed), strict=True):
        decoded = vae.decode_codes(vae.encode(pixel_values, grain_map=grain_map).codes).sample.clamp(-1, 1)
        num_codes = sum(4**granularity for granularity in grain_map.flatten().tolist())
        map_bits = 16 * math.log2(3)
        assert [int(row[f"{side}x{side} regions"]) for side in (8, 4, 2)] == [(grain_map == g).sum() for g in range(3)]
        assert row["codes"] == f"{num_codes} of at most 256"
        assert row["bits"] == f"{num_codes * 4 + map_bits:.0f} ({num_codes * 4} codes + {map_bits:.0f} grain map)"
        assert float(row["bits a pixel"]) == pytest.approx((num_codes * 4 + map_bits) / 1024, abs=6e-4)
        assert float(row["PSNR"].removesuffix(" dB")) == pytest.approx(psnr(decoded, pixel_values), abs=6e-3)
        inside = psnr(decoded[..., :16, 8:16], pixel_values[..., :16, 8:16])
        assert float(row["PSNR where painted"].removesuffix(" dB")) == pytest.approx(inside, abs=6e-3)
    shown = DQImageProcessor().post_process(decoded)[0]
    assert (pixels(view.image) == enlarged(shown, 12)).all()


def test_an_upload_is_reconstructed_by_the_router_and_at_any_share(loaded, address, photo):
    client = visitor(address)
    editor = client.predict(handle_file(photo), api_name="/open")
    pixel_values = DQImageProcessor(size={"height": 16, "width": 16})(Image.open(photo))["pixel_values"]
    shown = DQImageProcessor().post_process(pixel_values)[0]
    assert (pixels(opened(editor["background"])) == enlarged(shown, 24)).all()
    editor = {"background": None, "layers": [], "composite": None}
    for by_router, share in ((True, 0.0), (False, 0.5), (False, 1.0)):
        _, image, figures = client.predict(editor, by_router, share, api_name="/reconstruct")
        with torch.no_grad():
            encoded = loaded[0].encode(pixel_values, fine_ratio=None if by_router else share)
            decoded = loaded[0].decode_codes(encoded.codes).sample.clamp(-1, 1)
        (row,) = table(figures)
        assert row["codes"] == f"{int(encoded.num_codes)} of at most 64"
        assert row["bits"].split()[0] == str(int(encoded.num_codes) * 4 + 16)
        assert row["PSNR"] == f"{psnr(decoded, pixel_values):.2f} dB"
        assert (pixels(opened(image)) == enlarged(DQImageProcessor().post_process(decoded)[0], 24)).all()


def painted_over(*regions, grid=4, side=384):
    """A layer of the editor with these (row, column) regions painted over."""
    layer, step = Image.new("RGBA", (side, side)), side // grid
    for row, column in regions:
        layer.paste((255, 0, 0, 255), (column * step, row * step, (column + 1) * step, (row + 1) * step))
    return layer


def test_painted_regions_prescribe_the_finest_codes_and_the_coarsest_elsewhere(loaded):
    three = make_transformer(grid_sizes=[[2, 2], [4, 4], [8, 8]]).config
    painting = {"layers": [painted_over((0, 1), grid=2)]}
    assert painted_detail(painting, three).tolist() == [[0, 2], [0, 0]]
    for nothing in (None, {"layers": [Image.new("RGBA", (384, 384))]}):
        assert painted_detail(nothing, three) is None

    _, pipe = loaded
    grain_map = torch.zeros(4, 4, dtype=torch.long)
    grain_map[1, 2] = grain_map[3, 0] = 1
    found = painted_detail({"layers": [painted_over((1, 2), (3, 0))]}, pipe.transformer.config)
    assert torch.equal(found, grain_map)
    *_, last = sample_frames(pipe, 1, 3, grain_map=found)
    assert torch.equal(last.grain_map, grain_map)
    assert (pixels(last.image) == pixels(directly(pipe, 1, 3, grain_map=grain_map))).all()


def test_painted_regions_are_drawn_again_and_all_others_stay(loaded):
    vae, pipe = loaded
    inpaint = DQInpaintPipeline.from_pipe(pipe)
    pixel_values = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    original = DQImageProcessor().post_process(pixel_values)[0]
    painting = {"layers": [painted_over((0, 1), (2, 2))]}
    view = edit_painted(inpaint, pixel_values, painting, 2, 5, num_candidates=2, guidance_scale=1.5)

    mask = np.zeros((16, 16), dtype=bool)
    mask[:4, 4:8] = mask[8:12, 8:12] = True
    options = dict(class_labels=2, image=original, mask_image=mask, num_candidates=2, guidance_scale=1.5)
    output = inpaint(**options, generator=torch.Generator().manual_seed(5))
    assert (pixels(view.image) == enlarged(output.images[0], 24)).all()
    stays = ~mask.repeat(24, 0).repeat(24, 1)
    assert (pixels(view.image)[stays] == enlarged(original, 24)[stays]).all()
    (row,) = table(view.figures)
    assert row["regions drawn again"] == "2 of 16"
    assert row["codes"] == f"{int((4**output.grain_maps).sum())} of at most 64"
    with pytest.raises(ValueError, match="nothing is painted"):
        edit_painted(inpaint, pixel_values, None, 2, 5)


def test_what_a_visitor_paints_is_sampled_with_detail_or_drawn_again(loaded, address, photo, tmp_path):
    client = visitor(address)
    layer = handle_file(save(tmp_path / "layer.png", painted_over((1, 2), (3, 0))))
    painting = EMPTY | {"layers": [layer]}
    grain_map = torch.zeros(4, 4, dtype=torch.long)
    grain_map[1, 2] = grain_map[3, 0] = 1
    image, *_ = client.predict(1, 7, *list(SAMPLING.values())[:-1], painting, api_name="/sample")
    expected = directly(loaded[1], 1, 7, grain_map=grain_map, **OPTIONS)
    assert (pixels(opened(image)) == enlarged(expected, 24)).all()

    client.predict(handle_file(photo), api_name="/open_to_edit")
    coding, image, figures = client.predict(painting, 1, 7, 1.5, 2, api_name="/edit")
    pixel_values = DQImageProcessor(size={"height": 16, "width": 16})(Image.open(photo))["pixel_values"]
    inpaint, painting = DQInpaintPipeline.from_pipe(loaded[1]), {"layers": [painted_over((1, 2), (3, 0))]}
    view = edit_painted(inpaint, pixel_values, painting, 1, 7, guidance_scale=1.5, num_candidates=2)
    assert (pixels(opened(image)) == pixels(view.image)).all() and figures == view.figures
    assert (pixels(opened(coding)) == pixels(view.coding)).all()
    with pytest.raises(AppError, match="nothing is painted; paint over what is to be drawn again"):
        client.predict(EMPTY, 1, 7, 1.5, 2, api_name="/edit")
    with pytest.raises(AppError, match="there is no image; upload one, or take a sample"):
        visitor(address).predict(EMPTY, 1, 7, 1.5, 2, api_name="/edit")


def save(path, image, **options):
    image.save(path, **options)
    return path


def write(path, content):
    path.write_bytes(content)
    return path


BAD_UPLOADS = {
    "text.png": (lambda path: write(path, b"hello"), "text.png is damaged, or no image; expected PNG, JPEG, WEBP"),
    "empty.png": (lambda path: write(path, b""), "empty.png is damaged, or no image"),
    "cut.png": (
        lambda path: write(path, save(path, Image.effect_noise((64, 64), 50)).read_bytes()[:900]),
        "cut.png is damaged, or no image",
    ),
    "header.png": (
        lambda path: write(path, b"\x89PNG\r\n\x1a\n\0\0\0\4IHDR" + bytes(8)),  # Pillow: ValueError
        "header.png is damaged, or no image; expected PNG",
    ),
    "script.eps": (lambda path: save(path, Image.new("RGB", (8, 8))), "script.eps is damaged, or no image"),
    "large.png": (
        lambda path: save(path, Image.new("1", (5001, 5000))),
        "large.png has more than 25 million pixels; make it smaller",
    ),
    "bomb.png": (lambda path: save(path, Image.new("1", (20000, 10000))), "bomb.png has more than 25 million pixels"),
    "thin.png": (
        lambda path: save(path, Image.new("L", (17, 1))),
        "thin.png is 17x1 pixels; one side may be at most 16",
    ),
    "heavy.png": (lambda path: write(path, bytes(20 * 2**20 + 1)), "heavy.png is larger than 20 MB; make it smaller"),
}


@pytest.mark.parametrize("name", BAD_UPLOADS)
def test_uploads_that_are_refused(name, tmp_path):
    make, message = BAD_UPLOADS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        read_upload(make(tmp_path / name))


def test_a_refused_upload_is_a_message_and_the_page_goes_on(address, photo, tmp_path):
    client = visitor(address)
    with pytest.raises(AppError, match="^notes.png is damaged, or no image; expected"):
        client.predict(handle_file(write(tmp_path / "notes.png", b"no image")), api_name="/open")
    with pytest.raises(AppError, match="scale it and convert it to mode L"):
        client.predict(handle_file(save(tmp_path / "range.tif", Image.new("F", (9, 9)))), api_name="/open")
    client.predict(handle_file(photo), api_name="/open")


def post(address, endpoint, values):
    """The event of a request that no client of gradio's has looked at."""
    response = httpx.post(f"{address}gradio_api/call/{endpoint}", json={"data": values})
    return f"{address}gradio_api/call/{endpoint}/{response.json()['event_id']}"


def answer(address, endpoint, values):
    """The last line of what comes back."""
    return httpx.get(post(address, endpoint, values), timeout=60).text.strip().splitlines()[-1]


SAMPLE = [1, 7, *SAMPLING.values()]
EMPTY = {"background": None, "layers": [], "composite": None}
FILE = {"path": "x.png", "meta": {"_type": "gradio.FileData"}}
WRONG_CLASSES = ([0] * 100_000, [1], {"a": 1}, "moon", "m" * 10**6, 7, -1, 1.5, True, None)
WRONG_SEEDS = ("x", [1], 1.5, -1, 1e300, None)
WRONG_NUMBERS = ([1], "x", None, -1, 1e300)
WRONG_FILES = (3, [FILE], "/etc/passwd", FILE | {"path": "/etc/passwd"}, {}, None)
WRONG_PAINTINGS = (3, [1], EMPTY | {"layers": 3}, EMPTY | {"layers": [FILE] * 1000})
WRONG_PAINTINGS += (EMPTY | {"layers": [FILE | {"path": "/etc/passwd"}]},)
PAINTINGS = (("sample", 6), ("edit", 0), ("reconstruct", 0))
WRONG = [
    *((name, place, value) for name, place in (("sample", 0), ("edit", 1)) for value in WRONG_CLASSES),
    *((name, place, value) for name, place in (("sample", 1), ("edit", 2)) for value in WRONG_SEEDS),
    *(("sample", place, value) for place in (2, 3, 4, 5) for value in WRONG_NUMBERS),
    *(("edit", 3, value) for value in WRONG_NUMBERS),
    *(("edit", 4, value) for value in (*WRONG_NUMBERS, 0, 1.5, 17, True)),
    *((name, 0, value) for name in ("open", "open_to_edit") for value in WRONG_FILES),
    *((name, place, value) for name, place in PAINTINGS for value in WRONG_PAINTINGS),
    *(("reconstruct", 1, value) for value in ("yes", 3, [True], None)),
    *(("reconstruct", 2, value) for value in ("a", [1], 2, -1, None)),
]


def test_what_an_endpoint_does_not_take_is_a_message(loaded, address, capfd):
    calls = []
    hook = loaded[1].transformer.position_transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    right = {"sample": SAMPLE, "open": [FILE], "reconstruct": [EMPTY, True, 0.5]}
    right |= {"open_to_edit": [FILE], "edit": [EMPTY, 1, 7, 1.5, 4]}
    wrong = [(name, [*right[name][:i], value, *right[name][i + 1 :]]) for name, i, value in WRONG]
    wrong += [(name, values[:-1]) for name, values in right.items()]
    wrong += [(name, [*values, 0]) for name, values in right.items()]
    for endpoint, values in wrong:
        told = json.loads(answer(address, endpoint, values).removeprefix("data: "))
        assert 10 < len(told["error"]) < 200, (endpoint, str(values)[:100], told)
        assert endpoint.startswith("open") or "there is no image" not in told["error"]  # what comes after the checks
        assert "passwd" not in told["error"] and str(Path.cwd()) not in told["error"]
    hook.remove()
    assert not calls and "Traceback" not in capfd.readouterr().err
    assert "image.png" in answer(address, "sample", SAMPLE)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([0, 1, 0.5, 10**400, "0", math.nan]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.sampled_from(["layers", "path"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def endpoints(loaded):
    """What the endpoints of the page call, by their names."""
    return {block.api_name: block.fn for block in make_page(*loaded).fns.values()}


@given(st.lists(JSON, min_size=7, max_size=7))
def test_any_values_are_sampled_with_or_refused_by_a_message(endpoints, values):
    try:
        next(endpoints["sample"](*values))
    except gr.Error as error:
        assert 0 < len(error.message) < 300
    else:
        label, seed, *numbers, _ = values
        assert label in range(3) and 0 <= seed < 2**31 and all(0 < number <= 8 for number in numbers)


@given(st.lists(JSON, min_size=5, max_size=5))
def test_any_edit_is_refused_by_a_message_where_nothing_is_painted(endpoints, values):
    with pytest.raises(gr.Error) as refused:
        endpoints["edit"](torch.zeros(1, 3, 16, 16), *values)
    assert 0 < len(refused.value.message) < 300


@given(st.lists(JSON, min_size=3, max_size=3))
def test_any_painting_is_reconstructed_or_refused_by_a_message(endpoints, values):
    try:
        endpoints["reconstruct"](torch.zeros(1, 3, 16, 16), *values)
    except gr.Error as error:
        assert 0 < len(error.message) < 300


def test_who_leaves_ends_the_sampling_and_the_next_is_served(loaded, address):
    steps = []

    def step(*_):
        steps.append(1)
        time.sleep(0.1)

    hook = loaded[1].transformer.position_transformer.register_forward_pre_hook(step)
    with httpx.stream("GET", post(address, "sample", SAMPLE), timeout=60) as stream:
        for line in stream.iter_lines():
            if "generating" in line:
                break
    hook.remove()
    count = len(steps)
    assert "image.png" in answer(address, "sample", SAMPLE)
    assert count < 10 and len(steps) <= count + 4  # a frame is of two or three steps


def test_visitors_wait_their_turn_and_too_many_are_told_so(loaded, serving, monkeypatch):
    monkeypatch.setattr(demo_page, "MAX_WAITING", 1)
    vae, pipe = loaded
    address = serving(make_page(vae, pipe))
    begun, go_on, caches = threading.Event(), threading.Event(), []

    def hold(_, arguments, named):
        caches.append(named["past_key_values"])  # each sample has its own
        begun.set()
        assert go_on.wait(60)

    hook = pipe.transformer.position_transformer.register_forward_pre_hook(hold, with_kwargs=True)
    try:
        clients = [visitor(address) for _ in range(3)]
        jobs = [clients[0].submit(0, 10, *SAMPLING.values(), api_name="/sample")]
        assert begun.wait(60)
        jobs.append(clients[1].submit(1, 11, *SAMPLING.values(), api_name="/sample"))
        while "IN_QUEUE" not in jobs[1].status().code.name:
            time.sleep(0.02)
        with pytest.raises(Exception, match="[Qq]ueue is full"):
            clients[2].predict(2, 12, *SAMPLING.values(), api_name="/sample")
        assert len(caches) == 1
        go_on.set()
        results = [job.result(timeout=300) for job in jobs]
    finally:
        go_on.set()
        hook.remove()
    for label, result in enumerate(results):
        expected = directly(pipe, label, 10 + label, **OPTIONS)
        assert (pixels(opened(result[0])) == enlarged(expected, 24)).all()
    assert len([cache for cache, _ in itertools.groupby(map(id, caches))]) == 2  # their steps were never mixed


def components(page):
    return {(block["type"], block["props"].get("label")): block["props"] for block in page.config["components"]}


def test_an_unconditional_model_has_no_class_and_no_guidance(models):
    vae, pipe = load_models(models / "unconditional")
    page = make_page(vae, pipe)
    found = components(page)
    assert not found["dropdown", "Class"]["visible"] and not found["slider", "Guidance scale"]["visible"]
    *_, last = sample_frames(pipe, None, 5)
    assert (pixels(last.image) == pixels(directly(pipe, None, 5))).all()


def test_words_that_the_model_does_not_know_are_told(monkeypatch):
    told = []
    monkeypatch.setattr(gr, "Warning", told.append)
    pipe = DQPipeline(make_vae(), make_transformer(**TEXT), make_text_encoder(), make_text_tokenizer())
    with gr.Blocks():
        inputs = add_condition(pipe)
    inputs.read(None, 0, 1, "a red heart")
    inputs.read(None, 0, 1, "a purple dragon")
    assert told == ["The model does not know 'purple', 'dragon', and reads all such words alike."]


def test_a_prompt_samples_and_edits_as_the_pipelines_do_and_others_are_refused(serving, photo, tmp_path):
    parts = make_vae(), make_transformer(**TEXT)
    pipe = DQPipeline(*parts, make_text_encoder(), make_text_tokenizer())
    address = serving(make_page(pipe.vae, pipe))
    client = visitor(address)
    layer = handle_file(save(tmp_path / "layer.png", painted_over((1, 2), (3, 0))))
    painting, painted = EMPTY | {"layers": [layer]}, {"layers": [painted_over((1, 2), (3, 0))]}
    client.predict(handle_file(photo), api_name="/open_to_edit")
    pixel_values = DQImageProcessor(size={"height": 16, "width": 16})(Image.open(photo))["pixel_values"]
    inpaint = DQInpaintPipeline.from_pipe(pipe)
    for prompt in ("a red heart", ""):
        image, *_ = client.predict(None, 7, *SAMPLING.values(), prompt, api_name="/sample")
        options = dict(generator=torch.Generator().manual_seed(7), **OPTIONS)
        assert (pixels(opened(image)) == enlarged(pipe(prompt, **options).images[0], 24)).all()
        _, image, _ = client.predict(painting, None, 7, 1.5, 2, prompt, api_name="/edit")
        options = dict(guidance_scale=1.5, num_candidates=2)
        view = edit_painted(inpaint, pixel_values, painted, None, 7, prompt=prompt, **options)
        assert (pixels(opened(image)) == pixels(view.image)).all()
    untouched, *_ = client.predict(None, 7, *SAMPLING.values(), api_name="/sample")
    empty, *_ = client.predict(None, 7, *SAMPLING.values(), "", api_name="/sample")
    assert (pixels(opened(untouched)) == pixels(opened(empty))).all()
    for endpoint, values in (("sample", [None, 7, *SAMPLING.values()]), ("edit", [EMPTY, None, 7, 1.5, 2])):
        for wrong in (3, None, ["sun"], "x" * 501):
            told = json.loads(answer(address, endpoint, [*values, wrong]).removeprefix("data: "))
            assert "the prompt" in told["error"]


def test_only_so_many_visitors_images_are_kept(loaded, serving, monkeypatch, photo):
    monkeypatch.setattr(demo_page, "MAX_SESSIONS", 1)
    address = serving(make_page(*loaded))
    first, second = visitor(address), visitor(address)
    first.predict(handle_file(photo), api_name="/open_to_edit")
    with pytest.raises(AppError, match="nothing is painted"):
        first.predict(EMPTY, 1, 7, 1.5, 2, api_name="/edit")
    second.predict(handle_file(photo), api_name="/open_to_edit")
    with pytest.raises(AppError, match="there is no image; upload one, or take a sample"):
        first.predict(EMPTY, 1, 7, 1.5, 2, api_name="/edit")


def test_a_tokenizer_alone_has_no_tab_that_samples(models):
    vae, pipe = load_models(models / "vae")
    tabs = [label for kind, label in components(make_page(vae, pipe)) if kind == "tabitem"]
    assert pipe is None and tabs == ["Reconstruct"]


def test_shares_for_each_granularity_but_the_coarsest():
    three = components(make_page(make_vae(granularities=[8, 4, 2], block_out_channels=[8, 8, 16, 16])))
    labels = [label for kind, label in three if kind == "slider"]
    assert labels == [f"Share of regions with codes of {side}x{side} pixels" for side in (4, 2)]
    one = components(make_page(make_vae(granularities=[4])))
    assert not [label for kind, label in one if kind == "slider"]
    assert not one["checkbox", "The router decides"]["visible"]


def test_what_the_command_refuses(models, capsys, monkeypatch):
    def refused(*options):
        with pytest.raises(SystemExit) as stop:
            main(["demo", "--model", str(models / "vae"), *options])
        printed = capsys.readouterr()
        assert stop.value.code == 1 and printed.out == "" and printed.err.count("\n") == 1
        return printed.err

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert f"cannot listen at 127.0.0.1:{port}: Address already in use; choose another --port" in refused(
            "--port", port
        )
    assert "--port must lie in 0 ... 65535, got 70000" in refused("--port", "70000")
    assert "cannot listen at 192.0.2.1:" in refused("--host", "192.0.2.1", "--port", "0")
    assert "nowhere" in refused("--model", "./nowhere", "--port", "0")
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "dq_hf.demo.page")
    assert 'the demo needs gradio; install it with pip install -c constraints.txt -e ".[demo]"' in refused(
        "--port", "0"
    )


@pytest.mark.slow
def test_the_space_runs_from_its_folder_alone_and_asks_nothing_from_elsewhere(models, tmp_path):
    folder = tmp_path / "space"
    shutil.copytree(ROOT / "examples" / "space", folder)
    shutil.copytree(ROOT / "src" / "dq_hf", folder / "dq_hf", ignore=shutil.ignore_patterns("__pycache__", "dq-emoji"))
    shutil.copytree(models / "conditional", folder / "model")
    code = "sys.path.insert(0, '')\nimport os\nos.environ['GRADIO_SERVER_PORT'] = '{port}'\n"
    code += "runpy.run_path('app.py', run_name='__main__')\n"
    process, lines, port = start(code, folder, MODEL="model", PYTHONPATH="")
    try:
        assert lines[-1] == f"http://localhost:{port}\n"
        client = visitor(f"http://127.0.0.1:{port}")
        assert client.config["title"] == "model · dq_hf"
        image = client.predict(0, 4, *SAMPLING.values(), api_name="/sample")[0]
        expected = directly(DQPipeline.from_pretrained(models / "conditional"), 0, 4, **OPTIONS)
        assert (pixels(opened(image)) == enlarged(expected, 24)).all()
    finally:
        stop(process, lines)


def test_the_space_needs_what_the_package_needs():
    listed = (ROOT / "examples" / "space" / "requirements.txt").read_text().split()
    setup = (ROOT / "setup.py").read_text()
    assert listed == re.findall(r'"(.+?)"', re.search(r"install_requires=\[(.*?)\]", setup, re.S)[1])
    card = (ROOT / "examples" / "space" / "README.md").read_text()
    least = re.search(r'"demo": \["gradio>=([\d.]+),', setup)[1]
    assert re.search(r"^sdk_version: (\S+)$", card, re.M)[1].startswith(least)
