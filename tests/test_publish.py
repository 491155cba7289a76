"""Model cards say what was measured and nothing else, and a finished folder goes to a Hub and comes back unchanged."""

import math
import re
import shlex
import sys
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import make_transformer, make_vae
from hub_server import HubServer, card_errors, run_client
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from dq_hf import DQForImageGeneration, DQImageProcessor
from dq_hf.training.publish import check_push, command_line, machine_facts, push_folder, write_model_card

VAE_FACTS = dict(
    title="tiny-vae",
    summary="A tokenizer of a test.",
    repo_id="user/vae",
    dataset="someone/pictures",
    test_split="test",
    metrics={"psnr": 24.5312, "codes_per_image": 40.0},
    losses={"loss": 0.123456, "share_2": 0.5},
    data={"training images": 3426, "unreadable images dropped": None, "split": "a|b"},
    training={"steps": 4000, "epochs": 37.44, "mirrored": True},
    command="python train.py --data 'my pictures'",
    license="mit",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Finished folders: `vae`, and `joint`, of three classes, with a picture of samples."""
    place = tmp_path_factory.mktemp("publish")
    vae = make_vae()
    vae.save_pretrained(place / "vae")
    DQImageProcessor(size={"height": 16, "width": 16}).save_pretrained(place / "vae")
    write_model_card(place / "vae", **VAE_FACTS)
    names = {0: "sun", 1: "full moon", 2: "star"}
    joint = DQForImageGeneration.from_models(vae, make_transformer(num_classes=3, id2label=names))
    joint.save_pretrained(place / "joint")
    Image.new("RGB", (8, 8)).save(place / "joint" / "samples.png")
    write_model_card(place / "joint", title="tiny", summary="Both stages.", repo_id="user/joint")
    Image.new("RGB", (20, 30)).save(place / "image.png")
    return place


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


# Cards


def read_card(folder):
    """Header and body."""
    return re.fullmatch(r"---\n(.*?)\n---\n(.*)", (folder / "README.md").read_text(), re.DOTALL).groups()


def test_the_header_names_task_data_and_results(place):
    header = yaml.safe_load(read_card(place / "vae")[0])
    (model,) = header.pop("model-index")
    assert header == {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "license": "mit",
        "datasets": ["someone/pictures"],
        "tags": ["dq_hf", "vector-quantization", "image-tokenizer"],
    }
    assert model["name"] == "tiny-vae"
    (result,) = model["results"]
    assert result["dataset"] == {"name": "someone/pictures", "type": "someone/pictures", "split": "test"}
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [
        ("psnr", 24.5312),
        ("codes_per_image", 40.0),
    ]
    assert not card_errors((place / "vae" / "README.md").read_text())


def test_the_client_reads_the_header_back(place):
    data = ModelCard.load(place / "vae" / "README.md").data
    assert data.license == "mit" and data.model_name == "tiny-vae"
    assert {result.metric_type: result.metric_value for result in data.eval_results}["psnr"] == 24.5312


def test_the_body_has_what_was_measured_with_units(place):
    body = read_card(place / "vae")[1]
    for row in (
        "| held out, split `test` | |\n|---|---|\n| PSNR of the reconstructions, mean over images | 24.53 dB |",
        "| codes an image, mean | 40 |",
        "| loss, all terms | 0.1235 |\n| share of regions with 2 x 2 pixels a code | 0.5 |",
        "| images | someone/pictures |\n| training images | 3,426 |\n| split | a\\|b |",
        "| steps | 4,000 |\n| epochs | 37.44 |\n| mirrored | yes |\n| software | dq_hf ",
        f"torch {torch.__version__}",
        "| image size | 16 x 16 |\n| granularities | 4 x 4 and 2 x 2 pixels a code |\n| router | entropy |",
        "```\npython train.py --data 'my pictures'\n```",
        "arXiv:2305.11718",
    ):
        assert row in body
    assert "dropped" not in body and "None" not in body


def test_what_is_not_known_is_left_out(place):
    header, body = read_card(place / "joint")
    assert yaml.safe_load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["dq_hf", "vector-quantization", "image-tokenizer", "image-generation"],
    }
    assert re.findall("^## (.*)", body, re.MULTILINE) == ["Use", "Measured", "Training", "Citation"]
    assert "![samples](samples.png)" in body and "reconstructions.png" not in body
    assert "held out" not in body and "None" not in body and "| classes | 3 |" in body


def test_local_data_and_infinite_figures_stay_out_of_the_header(place, tmp_path):
    folder = tmp_path / "model"
    make_vae().save_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="has no preprocessor_config.json; save"):
        write_model_card(folder, title="t", summary="s")
    DQImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    for dataset, header_says in ((str(tmp_path), "custom"), ("examples/data/emoji", "custom"), ("cifar10", "cifar10")):
        metrics = {"psnr": math.inf, "codes_per_image": 3}
        write_model_card(folder, title="t", summary="s", dataset=dataset, metrics=metrics)
        header = yaml.safe_load(read_card(folder)[0])
        assert ("datasets" in header) == (header_says != "custom")
        (result,) = header["model-index"][0]["results"]
        assert result["dataset"]["type"] == header_says and len(result["metrics"]) == 1
        assert "| inf dB |" in read_card(folder)[1]


def test_the_command_line_can_be_pasted_and_keeps_secrets(monkeypatch):
    words = ["examples/train.py", "--data", "my pictures/*", "--hub_token", "abc", "--api-key=def", "--steps", "3"]
    words += ["--tokenizer", "vae", "--note", "hf_abcdefghij", "--url", "https://me:pass@host/x", "--token", "--push"]
    monkeypatch.setattr(sys, "argv", words)
    expected = ["examples/train.py", "--data", "my pictures/*", "--hub_token", "HIDDEN", "--api-key=HIDDEN"]
    expected += ["--steps", "3", "--tokenizer", "vae", "--note", "HIDDEN", "--url", "https://HIDDEN@host/x"]
    assert shlex.split(command_line()) == ["python", *expected, "--token", "--push"]
    assert "'my pictures/*'" in command_line()


def test_machine_facts_tell_processes_and_precision():
    facts = machine_facts(Accelerator(cpu=True))
    assert facts == {"processes": 1, "precision": "float32", "device of a process": "cpu"}


# To the Hub and back


def test_the_hub_of_these_tests_serves_parts_of_files(hub):
    hub.add("user/parts", {"a/b.txt": b"0123456789"})
    address = f"{hub.url}/user/parts/resolve/main/a/b.txt"
    for asked, status, content in (
        ("bytes=3-", 206, b"3456789"),
        ("bytes=0-4", 206, b"01234"),
        ("", 200, b"0123456789"),
    ):
        with urlopen(Request(address, headers={"Range": asked})) as answer:
            assert (answer.status, answer.read()) == (status, content)
            assert len(answer.headers["X-Repo-Commit"]) == 40
    with pytest.raises(HTTPError, match="416"):
        urlopen(Request(address, headers={"Range": "bytes=10-"}))


PUSH = """
import os
from huggingface_hub import HfApi, constants
from dq_hf.training.publish import check_push, push_folder

def error_of(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

assert check_push("vae") == "user/vae"
assert HfApi().list_repo_files("user/vae") == [".gitattributes"]
assert push_folder("vae", "user/vae") == os.environ["HF_ENDPOINT"] + "/user/vae"  # its first PUT is dropped
assert push_folder("joint", "user/joint", private=True).endswith("/user/joint")

print("cut", error_of(push_folder, "vae", "user/cut", private=True))  # its commit is dropped
assert HfApi().list_repo_files("user/cut") == [".gitattributes"]
push_folder("vae", "user/cut", private=True)

print("public", error_of(check_push, "user/vae", private=True))
print("name", error_of(check_push, "user/a/b"))
print("theirs", error_of(check_push, "other/vae"))
os.environ["HF_TOKEN"] = "hf_read"
print("read", error_of(check_push, "user/vae"))
os.environ["HF_TOKEN"] = "hf_wrong"
print("wrong", error_of(push_folder, "vae", "user/vae"))
del os.environ["HF_TOKEN"]
print("none", error_of(check_push, "user/vae"))
os.environ["HF_TOKEN"] = "hf_write"
constants.ENDPOINT = "http://127.0.0.1:9"  # where nobody answers
print("silent", error_of(check_push, "user/vae"))
"""


@pytest.fixture(scope="module")
def pushed(hub, place):
    """What the client of `PUSH` printed, {situation: error}."""
    hub.drop_next("PUT", "user/vae", after_bytes=1000)
    hub.drop_next("POST", "user/cut/commit", after_bytes=50)
    lines = run_client(hub, PUSH, cwd=place).stdout
    return dict(re.findall(r"^(\w+) (\w+: .*(?:\n.* upload it .*)?)", lines, re.MULTILINE))


def test_a_pushed_folder_is_whole_and_has_our_card(hub, place, pushed):
    for name in ("vae", "joint"):
        paths = [path for path in (place / name).rglob("*") if path.is_file()]
        files = {path.relative_to(place / name).as_posix(): path.read_bytes() for path in paths}
        there = hub.files(f"user/{name}")
        assert {path: file.content for path, file in there.items() if path != ".gitattributes"} == files
        assert len(hub.repositories["models", f"user/{name}"].snapshots) == 2  # one commit after the Hub's own
    assert hub.repositories["models", "user/joint"].private


def test_an_upload_that_is_cut_leaves_nothing_visible_and_can_be_repeated(hub, place, pushed):
    assert sum("user/vae" in request.path for request in hub.requests if request.method == "PUT") == 2
    assert pushed["cut"].startswith("ConnectionError: the upload to user/cut failed: ")
    assert "vae is whole; upload it later with `hf upload user/cut vae . --private`" in pushed["cut"]
    weights = (place / "vae" / "model.safetensors").read_bytes()
    assert hub.files("user/cut")["model.safetensors"].content == weights
    # The second time only the commit is sent again: the weights were there.
    assert sum("user/cut" in request.path for request in hub.requests if request.method == "PUT") == 1


def test_refusals_say_what_to_do(pushed):
    for situation, error in {
        "public": "ValueError: user/vae was to be private, but it exists and is public",
        "name": 'ValueError: the repository must be "user/name" or "name", got \'user/a/b\'',
        "theirs": "PermissionError: other/vae cannot be written: the token has no right to it; make one that may",
        "read": "PermissionError: user/vae cannot be written: the token has no right to it; make one that may",
        "wrong": "PermissionError: user/vae cannot be written: the token is not valid; run `hf auth login`",
        "none": "PermissionError: user/vae cannot be uploaded without a token; run `hf auth login` or set HF_TOKEN",
        "silent": "ConnectionError: user/vae cannot be written: [Errno 111] Connection refused (http://127.0.0.1:9)",
    }.items():
        assert pushed[situation].startswith(error)
    assert pushed["wrong"].endswith("vae is whole; upload it later with `hf upload user/vae vae .`")


def test_offline_mode_is_named(place):
    with pytest.raises(ConnectionError, match="cannot be uploaded in offline mode; unset HF_HUB_OFFLINE"):
        check_push("user/vae")
    with pytest.raises(ConnectionError, match="is whole; upload it later with `hf upload user/vae "):
        push_folder(place / "vae", "user/vae")
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        push_folder(place, "user/vae")


def test_the_command_for_uploading_by_hand_works(hub, place, pushed):
    command = re.search("`(.*)`", pushed["wrong"].replace("user/vae", "user/by-hand").splitlines()[-1])[1]
    program = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()"]
    run_client(hub, program + shlex.split(command)[1:], cwd=place)
    assert hub.files("user/by-hand").keys() == hub.files("user/vae").keys()


PULL = """
import re
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from dq_hf import DQForImageGeneration, DQVAEModel
from safetensors.torch import save_file

vae = DQVAEModel.from_pretrained("user/vae")  # its download is dropped
save_file(vae.state_dict(), "pulled-vae.safetensors")
joint = DQForImageGeneration.from_pretrained("user/joint")
save_file(joint.state_dict(), "pulled-joint.safetensors")
for name in ("vae", "joint"):
    path = hf_hub_download(f"user/{name}", "README.md")
    assert open(path, "rb").read() == open(f"{name}/README.md", "rb").read()
    for code in re.findall("```python\\n(.*?)```", open(path).read(), re.DOTALL):
        exec(code, variables := {})
assert len(variables["images"]) == 4
try:
    HfApi(token="hf_other").model_info("user/joint")
except RepositoryNotFoundError:
    print("private")
"""


def test_a_fresh_process_loads_what_was_pushed_by_the_code_of_its_card(hub, place, pushed):
    hub.drop_next("GET", "user/vae/resolve/.*/model.safetensors", after_bytes=1000)
    done = run_client(hub, PULL, cwd=place)
    assert "private" in done.stdout
    assert Image.open(place / "sample.png").size == (16, 16)
    weights = {"vae": load_file(place / "vae" / "model.safetensors")}
    weights["joint"] = {f"vae.{key}": value for key, value in weights["vae"].items()}
    transformer = load_file(place / "joint" / "transformer" / "model.safetensors")
    weights["joint"] |= {f"transformer.{key}": value for key, value in transformer.items()}
    for name, expected in weights.items():
        pulled = load_file(place / f"pulled-{name}.safetensors")
        assert pulled.keys() == expected.keys()
        assert all(torch.equal(pulled[key], expected[key]) for key in expected)
    downloads = "/user/vae/resolve/.*/model.safetensors"
    asked = [request for request in hub.requests if request.method == "GET" and re.match(downloads, request.path)]
    assert len(asked) == 2  # the first was dropped
    unknown = [request.path for request in hub.requests if request.status == 501]
    assert not [path for path in unknown if "user" in path]  # the rest is what the client tells about itself
