"""What a run tells about itself, and a finished folder that goes to a Hub and comes back unchanged."""

import re
import shlex
import sys

import pytest
import torch
from accelerate import Accelerator
from conftest import make_transformer, make_vae
from hub_server import HubServer, run_client
from PIL import Image

from dq_hf import DQForImageGeneration, DQImageProcessor
from dq_hf.hub.card import write_model_card
from dq_hf.hub.upload import check_push
from dq_hf.training.publish import command_line, machine_facts, push_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Finished folders: `vae`, and `joint`, of three classes, with pictures beside them."""
    place = tmp_path_factory.mktemp("publish")
    vae = make_vae()
    vae.save_pretrained(place / "vae")
    DQImageProcessor(size={"height": 16, "width": 16}).save_pretrained(place / "vae")
    write_model_card(place / "vae", vae.config, title="tiny", repository="user/vae", metrics={"psnr": 24.5})
    names = {0: "sun", 1: "full moon", 2: "star"}
    joint = DQForImageGeneration.from_models(vae, make_transformer(num_classes=3, id2label=names))
    joint.save_pretrained(place / "joint")
    Image.new("RGB", (8, 8)).save(place / "joint" / "samples.png")
    write_model_card(place / "joint", joint.config, title="tiny", repository="user/joint")
    Image.new("RGB", (20, 30)).save(place / "image.png")
    return place


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


def test_the_command_line_can_be_pasted_and_keeps_secrets(monkeypatch):
    words = ["examples/train.py", "--data", "https://me:pass@host/my pictures/*", "--vae=hf_abcdefghij", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", words)
    expected = ["examples/train.py", "--data", "https://HIDDEN@host/my pictures/*", "--vae=HIDDEN", "--seed", "3"]
    assert shlex.split(command_line()) == ["python", *expected]
    assert "'https://HIDDEN@host/my pictures/*'" in command_line()
    monkeypatch.setattr(sys, "argv", ["dq-hf train-tokenizer", "--output_dir", "run"])
    assert command_line() == "dq-hf train-tokenizer --output_dir run"


def test_machine_facts_tell_processes_and_precision():
    facts = machine_facts(Accelerator(cpu=True))
    software = facts.pop("software")
    assert facts == {"processes": 1, "precision": "float32", "device of a process": "cpu"}
    assert software.startswith("dq_hf ") and f"torch {torch.__version__}" in software


# To the Hub and back


PUSH = """
import os
from huggingface_hub import HfApi, constants
from dq_hf.hub.upload import check_push
from dq_hf.training.publish import push_folder

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
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from dq_hf import DQVAEModel

DQVAEModel.from_pretrained("user/vae")  # its download is dropped
for name in ("vae", "joint"):
    for code in re.findall("```python\\n(.*?)```", open(f"{name}/README.md").read(), re.DOTALL):
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
    downloads = "/user/vae/resolve/.*/model.safetensors"
    asked = [request for request in hub.requests if request.method == "GET" and re.match(downloads, request.path)]
    assert len(asked) == 2  # the first was dropped
    unknown = [request.path for request in hub.requests if request.status == 501]
    assert not [path for path in unknown if "user" in path]  # the rest is what the client tells about itself
