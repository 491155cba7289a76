"""A model with a text encoder on the Hub: pushed in one piece, pulled, carded, and loaded as remote code."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from conftest import TEXT, make_text_encoder, make_text_tokenizer, make_transformer, make_vae
from hub_server import HubServer, run_client
from PIL import Image
from test_remote_code import BLOCK

from dq_hf import DQForImageGeneration
from dq_hf.hub.card import split_card

PROMPT = "a red heart"


def make_model(kind="t5", tokenizer=True, **overrides):
    parts = make_vae(image_size=8), make_transformer(grid_sizes=[[2, 2], [4, 4]], **TEXT, **overrides)
    tokenizer = make_text_tokenizer() if tokenizer else None
    return DQForImageGeneration.from_models(*parts, make_text_encoder(kind), tokenizer).eval()


PUSH = """
from dq_hf import DQForImageGeneration, DQPipeline
DQPipeline.from_pretrained("model").push_to_hub("user/words", "words", export_code=True, tags=["hearts"])
pipe = DQPipeline.from_pretrained("user/words")
assert pipe.name_or_path == "user/words"
pipe("a red heart", generator=torch.Generator().manual_seed(3)).images[0].save("a.png")
pipeline("dq-generation", model="user/words")("a red heart", seed=3)["image"].save("b.png")
DQForImageGeneration.from_pretrained("user/words").save_pretrained("pulled")
"""
LOAD = """
pipeline("dq-generation", model="user/words", trust_remote_code=True)("a red heart", seed=3)["image"].save("c.png")
pipeline("dq-generation", model="model", trust_remote_code=True)("a red heart", seed=3)["image"].save("d.png")
for source in ("user/no-tokenizer", "no-tokenizer"):
    assert AutoModel.from_pretrained(source, trust_remote_code=True).tokenizer is None
"""
IMPORTS = "import torch\nfrom transformers import AutoModel, pipeline\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    make_model().save_pretrained(place / "model", export_code=True)
    make_model(tokenizer=False).save_pretrained(place / "no-tokenizer", export_code=True)
    with HubServer() as hub:
        hub.add("user/no-tokenizer", place / "no-tokenizer")
        run_client(hub, "import dq_hf\n" + IMPORTS + PUSH, cwd=place)
        (place / "files.json").write_text(json.dumps(sorted(hub.files("user/words"))))
        run_client(hub, BLOCK + IMPORTS + LOAD, cwd=place)
    return place


def test_a_prompt_gives_the_same_image_pushed_pulled_and_without_the_package(place):
    generator = torch.Generator().manual_seed(3)
    model = make_model()
    codes = model.generate(prompt=PROMPT, generator=generator).codes
    with torch.no_grad():
        values = model.vae.decode_codes(codes).sample[0].permute(1, 2, 0).clamp(-1, 1)
    expected = ((values + 1) / 2 * 255).round().numpy()
    for name in "abcd":
        assert np.array_equal(np.asarray(Image.open(place / f"{name}.png")), expected), name
    names = json.loads((place / "files.json").read_text())
    assert {"text_encoder/model.safetensors", "tokenizer/tokenizer.json", "text_dq.py"} <= set(names)
    assert "hearts" in split_card((place / "pulled" / "README.md").read_text())[0]["tags"]
    assert not any("modeling_t5" in name for name in names)  # of transformers itself
    pulled = DQForImageGeneration.from_pretrained(place / "pulled").state_dict()
    assert all(torch.equal(value, pulled[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("classes", [0, 3])
def test_the_card_says_what_reads_the_text_and_its_code_runs(classes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model("bert", num_classes=classes).save_pretrained("model")
    header, body = split_card((tmp_path / "model" / "README.md").read_text())
    assert header["pipeline_tag"] == "text-to-image" and yaml.safe_dump(header)
    assert "| text | 5 tokens of a BertModel |" in body
    variables = {}
    for block in re.findall("```python\n(.*?)```", body, re.DOTALL):
        exec(block.replace("path/to/this/folder", "model"), variables)
    assert len(variables["images"]) == 4
