"""The demo's page in Chromium, on the embedded model: what a visitor sees is what the library computes.

pytest -n 0 -m browser
"""

import io
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from served_page import enlarged, pixels, psnr, start, stop

from dq_hf import DEFAULT_MODEL, DQImageProcessor, DQInpaintPipeline, DQPipeline

pytestmark = pytest.mark.browser
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
SECOND = 1000  # playwright counts in milliseconds
PATIENCE = 90 * SECOND  # more than any answer takes, on a busy machine
SCALE = 6  # of a picture of 64 pixels
SHARE = "number input for Share of regions with codes of 4x4 pixels"
HEART, FACE = "red heart, flat style", "grinning face, 3d style"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a page that the command serves."""
    code = "from dq_hf.commands.main import main\nmain(['demo', '--port', '{port}'])"
    process, lines, port = start(code, tmp_path_factory.mktemp("served"))
    assert lines[-1] == f"http://127.0.0.1:{port}\n"
    yield lines[-1].strip()
    stop(process, lines)


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        pytest.fail(f"{CHROMIUM} is missing; install it with: apt-get install chromium")
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page for a new visitor; whatever it logs as an error or asks from elsewhere fails the test."""
    contexts, troubles = [], []

    def logged(message):
        # The page asks for the progress of an upload even if the upload has ended by then: gradio's own race.
        late = "/upload_progress" in message.location.get("url", "") or message.text == "Response"
        if message.type == "error" and not late:
            troubles.append(message.text)

    def requested(request):
        if not request.url.startswith((f"{address}/", "data:", f"blob:{address}/")):
            troubles.append(request.url)

    def visit():
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", logged)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", requested)
        page.goto(address)
        page.get_by_role("button", name="Sample", exact=True).wait_for()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert troubles == []


@pytest.fixture(scope="module")
def pipe():
    pipe = DQPipeline.from_pretrained(DEFAULT_MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """A file with a held-out picture, and the picture."""
    folder = Path(__file__).parents[2] / "examples" / "data" / "emoji"
    images = load_dataset("parquet", data_files=str(folder / "data" / "test-0*.parquet"), split="train")
    path = tmp_path_factory.mktemp("uploads") / "emoji.png"
    images[40]["image"].save(path)
    return path, Image.open(path)


def begin(page, button, prompt, seed):
    """Press the button that draws an image of this prompt and seed."""
    page.get_by_label("Prompt").filter(visible=True).fill(prompt)
    page.get_by_label("Seed").filter(visible=True).fill(str(seed))
    page.get_by_role("button", name=button, exact=True).click()


def expect_sample(page, pipe, prompt, seed, **options):
    expect(figures(page)).to_contain_text("bits a pixel")
    output = pipe(prompt, generator=torch.Generator().manual_seed(seed), **options)
    (row,) = table(page)
    num_codes = int((4**output.grain_maps).sum())
    assert row["codes"] == f"{num_codes} of at most 256"
    assert row["bits"] == f"{num_codes * 10 + 64} ({num_codes * 10} codes + 64 grain map)"
    assert (pixels(shown(page, "Sample")) == enlarged(output.images[0], SCALE)).all()


def figures(page):
    return page.locator(".prose.figures:visible")


def table(page):
    """Rows of the table as dictionaries."""
    head, *rows = (row.split("\t") for row in figures(page).inner_text().strip().splitlines())
    return [dict(zip(map(str.strip, head), map(str.strip, row))) for row in rows]


def shown(page, label):
    """The picture under a label, as the browser got it."""
    source = page.locator(".picture:visible", has_text=label).locator("img").first.get_attribute("src")
    return Image.open(io.BytesIO(page.request.get(source).body()))


def upload(page, path, tab="Reconstruct"):
    page.get_by_role("tab", name=tab).click()
    panel = page.get_by_role("tabpanel").filter(visible=True)
    panel.locator("input[type=file]:not([disabled])").first.set_input_files(path)


def expect_row(row, vae, pixel_values, grain_map=None, **options):
    """The row says what encoding with these options gives; gives the grain map and the decoded image."""
    with torch.no_grad():
        encoded = vae.encode(pixel_values, grain_map=grain_map, **options)
        decoded = vae.decode_codes(encoded.codes).sample.clamp(-1, 1)
    num_codes = int(encoded.num_codes)
    assert row["codes"] == f"{num_codes} of at most 256"
    assert row["bits"] == f"{num_codes * 10 + 64} ({num_codes * 10} codes + 64 grain map)"
    assert float(row["PSNR"].removesuffix(" dB")) == pytest.approx(psnr(decoded, pixel_values), abs=0.011)
    return encoded.grain_map, decoded


def test_sample(visit, address, pipe):
    page = visit()
    begin(page, "Sample", FACE, 3)
    expect(figures(page)).to_contain_text(re.compile(r"Element \d+ of at most 260"))  # it grows
    expect_sample(page, pipe, FACE, 3)
    sources = page.evaluate(
        "[...document.querySelectorAll('[src], link')].map(element => element.src || element.href)"
    )
    assert sources and all(source.startswith((address, "data:", "blob:")) for source in sources)


def test_an_untouched_page_draws_a_sample_without_text(visit, pipe):
    page = visit()
    page.get_by_role("button", name="Sample", exact=True).click()
    expect_sample(page, pipe, "", 0)


def test_detail_goes_where_it_is_painted(visit, pipe):
    page = visit()
    grain_map = torch.zeros(8, 8, dtype=torch.long)
    for row, column in ((2, 2), (2, 5), (5, 3)):
        dab(page, (column + 0.5) / 8, (row + 0.5) / 8)
        grain_map[row, column] = 1
    begin(page, "Sample", FACE, 3)
    expect(figures(page)).to_contain_text("73 of at most 256")  # 64 + 3 * 3
    expect_sample(page, pipe, FACE, 3, grain_map=grain_map)

    page.get_by_role("button", name="Erase what is painted").filter(visible=True).click()
    page.get_by_role("button", name="Sample", exact=True).click()
    expect(figures(page)).not_to_contain_text("73 of at most 256")
    expect_sample(page, pipe, FACE, 3)


def test_what_is_painted_over_is_drawn_again(visit, pipe, emoji):
    path, image = emoji
    page = visit()
    upload(page, path, "Edit")
    begin(page, "Draw again", FACE, 3)
    toast = page.locator(".toast-body").last
    expect(toast).to_be_visible()
    for _ in range(60):
        if "there is no image" not in toast.inner_text():
            break
        toast.locator(".toast-close").click()  # it is still being read
        expect(toast).to_be_hidden()
        page.get_by_role("button", name="Draw again").click()
        expect(toast).to_be_visible()
    expect(toast).to_contain_text("nothing is painted; paint over what is to be drawn again")
    toast.locator(".toast-close").click()

    mask = torch.zeros(64, 64, dtype=torch.bool)
    for row, column in ((4, 3), (4, 4)):
        dab(page, (column + 0.5) / 8, (row + 0.5) / 8)
        mask[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = True
    page.get_by_role("button", name="Draw again").click()
    expect(figures(page)).to_contain_text("bits a pixel")
    (row,) = table(page)
    assert row["regions drawn again"] == "2 of 64"
    pixel_values = DQImageProcessor.from_pretrained(DEFAULT_MODEL)(image)["pixel_values"]
    original = DQImageProcessor().post_process(pixel_values)[0]
    options = dict(image=original, mask_image=mask, prompt=FACE, num_candidates=4)
    output = DQInpaintPipeline.from_pipe(pipe)(**options, generator=torch.Generator().manual_seed(3))
    edited = pixels(shown(page, "Edited"))
    assert (edited == enlarged(output.images[0], SCALE)).all()
    stays = ~mask.numpy().repeat(SCALE, 0).repeat(SCALE, 1)
    assert (edited[stays] == enlarged(original, SCALE)[stays]).all()


def test_reconstruct_at_any_share_and_with_what_is_painted(visit, pipe, emoji):
    path, image = emoji
    pixel_values = DQImageProcessor.from_pretrained(DEFAULT_MODEL)(image)["pixel_values"]
    page = visit()
    upload(page, path)
    expect(figures(page)).to_contain_text("the router")
    expect_row(table(page)[0], pipe.vae, pixel_values)

    page.get_by_label(SHARE).fill("0.25")
    page.get_by_label(SHARE).press("Tab")
    expect(figures(page)).to_contain_text("the chosen share")
    expect(page.get_by_label("The router decides")).not_to_be_checked()
    (row,) = table(page)
    grain_map, decoded = expect_row(row, pipe.vae, pixel_values, fine_ratio=0.25)
    expected = DQImageProcessor().post_process(decoded)[0]
    assert abs(pixels(shown(page, "Reconstruction")) - enlarged(expected, SCALE)).max() <= 1

    coarse = (grain_map[0] == 0).nonzero()[[0, 9]].tolist()
    places = [((column + 0.5) / 8, (row + 0.5) / 8) for row, column in coarse]
    for place in places:  # a dab of the brush is as wide as a region
        dab(page, *place)
    expect(figures(page)).to_contain_text("112 of at most 256")  # 48 + 16 * 4
    more = figures(page).filter(has_text="118 of at most 256")  # three more for each of the two
    for _ in range(5):  # the editor may have sent a picture of before the last dab: once more at the same places
        with suppress(AssertionError):
            expect(more).to_be_visible(timeout=10_000)
            page.wait_for_timeout(2_000)  # nor is such a picture still on its way
            expect(more).to_be_visible(timeout=100)
            break
        for place in places:
            click(page, *place_of(page, *place))
    expect(more).to_be_visible()
    unpainted, painted = table(page)
    expect_row(unpainted, pipe.vae, pixel_values, fine_ratio=0.25)
    for row, column in coarse:
        grain_map[0, row, column] = 1
    _, decoded = expect_row(painted, pipe.vae, pixel_values, grain_map=grain_map)
    inside = [(..., slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)) for row, column in coarse]
    difference = torch.cat([(decoded - pixel_values)[place].flatten() for place in inside])
    found = float(painted["PSNR where painted"].removesuffix(" dB"))
    assert found == pytest.approx(psnr(difference, torch.zeros_like(difference)), abs=0.011)

    page.get_by_role("button", name="Erase what is painted").filter(visible=True).click()
    expect(figures(page)).not_to_contain_text("painted")
    expect_row(*table(page), pipe.vae, pixel_values, fine_ratio=0.25)


def place_of(page, x, y):
    """Where on the page this place of the picture in the editor is, given in shares of its width and height."""
    canvas = page.locator(".image-container canvas:visible").first.bounding_box()
    zoom = float(page.get_by_text(re.compile(r"^\d+%$")).filter(visible=True).inner_text().rstrip("%")) / 100
    side = 64 * SCALE * zoom  # the picture stands in the middle of the canvas
    left, top = canvas["x"] + (canvas["width"] - side) / 2, canvas["y"] + (canvas["height"] - side) / 2
    return left + x * side, top + y * side


def click(page, x, y):
    """Click at a place of the page, and away with the brush."""
    page.mouse.click(x, y)
    canvas = page.locator(".image-container canvas:visible").first.bounding_box()
    page.mouse.move(canvas["x"] + 1, canvas["y"] + 1)
    page.wait_for_timeout(200)


def dab(page, x, y):
    """Click at this place of the picture in the editor until it has paint that stays."""
    x, y = place_of(page, x, y)
    clip = {"x": x - 2, "y": y - 2, "width": 4, "height": 4}
    seen = before = page.screenshot(clip=clip)
    for _ in range(20):  # the editor misses clicks while the page is busy, and leaves the brush there for a while
        click(page, x, y)
        last, seen = seen, page.screenshot(clip=clip)
        if last == seen != before:
            return
    raise AssertionError(f"nothing was painted at {x:.0f}, {y:.0f}")


def test_wrong_uploads_get_a_message(visit, tmp_path, emoji):
    page = visit()
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "notes.png").write_text("no image")
    Image.new("1", (5001, 5000)).save(tmp_path / "large.png")
    (tmp_path / "heavy.png").write_bytes(bytes(20 * 2**20 + 1))
    for name, message in (
        ("notes.txt", "Invalid file type"),
        ("notes.png", "notes.png is damaged, or no image; expected PNG, JPEG"),
        ("large.png", "large.png has more than 25 million pixels; make it smaller"),
        ("heavy.png", "exceed the maximum allowed size of 20"),
    ):
        upload(page, tmp_path / name)
        toast = page.locator(".toast-body").last
        expect(toast).to_contain_text(message)
        assert "Traceback" not in page.content()
        toast.locator(".toast-close").click()
        expect(page.locator(".toast-body")).to_have_count(0)
    upload(page, emoji[0])
    expect(figures(page)).to_contain_text("PSNR")


def test_two_visitors_at_once_are_both_served(visit, pipe):
    first, second = visit(), visit()
    begin(first, "Sample", HEART, 1)
    begin(second, "Sample", FACE, 2)
    expect_sample(second, pipe, FACE, 2)
    expect_sample(first, pipe, HEART, 1)
