"""Draw the pictures of demo.md: the web demo's tabs that sample and edit, in Chromium, on the embedded model.

apt-get install chromium && pip install -c constraints.txt -e ".[test]"
python docs/draw_demo.py --output_dir docs/images
"""

import argparse
import re
from pathlib import Path

import datasets
from draw_figures import EMOJI
from playwright.sync_api import expect, sync_playwright

from dq_hf import DEFAULT_MODEL
from dq_hf.demo.page import launch, make_page
from dq_hf.demo.views import VIEW_SIDE
from dq_hf.loading import load_models

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
VIEWPORT = {"width": 1600, "height": 900}
PATIENCE = 10 * 60_000  # milliseconds
REGIONS = 8  # rows and columns of regions
FACE = "grinning face, 3d style"
DETAIL = [(row, column) for row in range(1, 7) for column in range(1, 7)]  # painted regions: where the face goes
EDITED, MOUTH = 212, [(row, column) for row in (5, 6) for column in range(2, 6)]  # held-out image, and its mouth


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="docs/images", type=Path, help="where the pictures go (%(default)s)")
    args = parser.parse_args()
    expect.set_options(timeout=PATIENCE)
    vae, pipe = load_models(DEFAULT_MODEL)
    address = launch(make_page(vae, pipe, title=Path(DEFAULT_MODEL).name))
    upload = args.output_dir / "upload.png"
    datasets.load_dataset(str(EMOJI), split="test")[EDITED]["image"].save(upload)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport=VIEWPORT)
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        paint(page, DETAIL)
        draw(page, "Sample", seed=2)
        page.screenshot(path=args.output_dir / "demo.png", full_page=True)

        page.get_by_role("tab", name="Edit").click()
        panel = page.get_by_role("tabpanel").filter(visible=True)
        panel.locator("input[type=file]:not([disabled])").first.set_input_files(upload)
        expect(panel.locator(".image-container canvas").first).to_be_visible()
        paint(page, MOUTH)
        draw(page, "Draw again", seed=0)
        page.screenshot(path=args.output_dir / "demo-edit.png", full_page=True)
        browser.close()
    upload.unlink()


def draw(page, button, seed):
    """Ask for a face and press a button, until the picture is there."""
    page.get_by_label("Prompt").filter(visible=True).fill(FACE)
    page.get_by_label("Seed").filter(visible=True).fill(str(seed))
    page.get_by_role("button", name=button, exact=True).click()
    expect(page.locator(".prose.figures:visible")).to_contain_text("bits a pixel")
    page.wait_for_timeout(1000)  # for the pictures to load


def paint(page, regions):
    """Dab over (row, column) regions of the picture in the editor."""
    canvas = page.locator(".image-container canvas:visible").first
    canvas.wait_for()
    page.wait_for_timeout(2000)  # until the picture lies on the canvas
    box = canvas.bounding_box()
    zoom = float(page.get_by_text(re.compile(r"^\d+%$")).filter(visible=True).inner_text().rstrip("%")) / 100
    side = VIEW_SIDE * zoom  # the picture stands in the middle of the canvas
    left, top = box["x"] + (box["width"] - side) / 2, box["y"] + (box["height"] - side) / 2
    for row, column in regions:
        page.mouse.click(left + (column + 0.5) / REGIONS * side, top + (row + 0.5) / REGIONS * side)


if __name__ == "__main__":
    main()
