"""Models are saved, pushed and pulled whole or not at all, and whoever cannot have one reads why.

The real client of the Hub runs in two processes: `CLIENT` pushes and pulls, over connections that break, and a second one is
offline. They write down what they met in JSON; the tests look at that, and at what the Hub holds.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_transformer, make_vae
from hub_server import HubServer, card_errors, run_client
from PIL import Image
from safetensors.torch import load_file

from dq_hf import DQForImageGeneration, DQImageProcessor, DQVAEModel
from dq_hf.hub.card import MARK, write_model_card
from dq_hf.hub.folders import files_of
from dq_hf.hub.weights import stale_files

NAMES = {0: "sun", 1: "moon", 2: "star"}
CUTS = {  # an upload's connection breaks: method, path, bytes of the body, and whether the client itself tries again
    "in the list of files": ("POST", "/user/cut/preupload", 10),
    "before the weights": ("PUT", "/user/cut/", 0),
    "in the weights": ("PUT", "/user/cut/", 70_000),
    "at the end of the weights": ("PUT", "/user/cut/", 78_000),
    "in the commit": ("POST", "/user/cut/commit/", 2000),
}
BREAKS = {  # a download's connection breaks: file, bytes of the answer
    "in the configuration": ("resolve/[0-9a-f]*/config.json", 100),
    "in the header of the weights": ("vae/model.safetensors", 100),
    "in the weights": ("vae/model.safetensors", 100_000),
    "in the second weights": ("transformer/model.safetensors", 50_000),
    "in the card": ("README.md", 10),
    "in a picture": ("samples.png", 30),
}

ANSWERS = {  # to a request for weights: what the server says instead, and what the error must say
    "error": ({"status": 500, "content": "broken"}, "OSError: user/joint .* cannot be loaded: .*500"),
    "page": ({"status": 200, "content": "<html>Sign in</html>"}, "(ConnectionError|OSError): user/joint"),
    "redirect": (
        {"status": 302, "content": "", "headers": {"Location": "http://127.0.0.1:9/"}},
        "ConnectionError: user/joint .* cannot be loaded: .* try again when the connection works",
    ),
}

PRELUDE = """
import json, os, shutil, sys, time
from pathlib import Path
from urllib.request import Request, urlopen
from huggingface_hub import HfApi
from safetensors.torch import save_file
from transformers import AutoModel, pipeline
from dq_hf import (
    DQForImageGeneration, DQImageProcessor, DQPipeline, DQTransformerForImageGeneration, DQVAEModel
)

met, tables = {}, json.loads(sys.stdin.read())
really_sleep = time.sleep
time.sleep = lambda seconds: really_sleep(min(seconds, 0.02))  # between attempts

def drop(**drops):
    request = Request(os.environ["HF_ENDPOINT"] + "/drop", json.dumps(drops).encode(), method="POST")
    return json.loads(urlopen(request).read())["left"]

def error_of(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def keep(name, model):
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, f"{name}.safetensors")
"""

CLIENT = (
    PRELUDE
    + """
vae, joint = DQVAEModel.from_pretrained("vae"), DQForImageGeneration.from_pretrained("joint")

# Every class can push.
met["commit"] = vae.push_to_hub("user/vae", commit_message="The tokenizer").oid
DQImageProcessor.from_pretrained("vae").push_to_hub("user/vae")
joint.transformer.push_to_hub("transformer", private=True, max_shard_size="20KB")
joint.push_to_hub("user/joint")
joint.push_to_hub("user/joint", revision="pieces", max_shard_size="20KB")
DQPipeline.from_pretrained("joint").push_to_hub("user/pipeline", private=True, revision="dev")
pipeline("dq-generation", "joint").push_to_hub("user/task")
joint.save_pretrained("saved", push_to_hub=True, repo_id="user/saved", max_shard_size="20KB")

# Over what was there.
for size in ("20KB", "1GB", "20KB"):
    joint.push_to_hub("user/over", max_shard_size=size)
    met.setdefault("over", []).append(HfApi().list_repo_files("user/over"))
for name in ("user/owned", "user/licensed", "user/ours"):
    vae.push_to_hub(name)

# Who may not.
met["other's"] = error_of(vae.push_to_hub, "other/vae")
met["read only"] = error_of(vae.push_to_hub, "user/new", token="hf_read")
met["unknown argument"] = error_of(vae.push_to_hub, "user/new", shards=3)

# Connections that break while it uploads.
other = DQForImageGeneration.from_pretrained("other")
joint.push_to_hub("user/cut")
for cut, (method, pattern, after_bytes) in tables["cuts"].items():
    drop(method=method, pattern=pattern, after_bytes=after_bytes, times=20)
    error = error_of(other.push_to_hub, "user/cut")
    left = drop()
    pulled = DQForImageGeneration.from_pretrained("user/cut", cache_dir="cache-cut").state_dict()
    same = all(value.equal(pulled[key]) for key, value in joint.state_dict().items())
    met.setdefault("cuts", {})[cut] = [error, left, same]
other.push_to_hub("user/cut")

# Every class can pull.
keep("vae-pulled", DQVAEModel.from_pretrained("user/vae"))
keep("vae-part", DQVAEModel.from_pretrained("user/joint", subfolder="vae"))
keep("transformer-pulled", DQTransformerForImageGeneration.from_pretrained("user/transformer", token="hf_write"))
keep("joint-pulled", AutoModel.from_pretrained("user/joint"))
keep("joint-pieces", DQForImageGeneration.from_pretrained("user/joint", revision="pieces"))
keep("joint-saved", DQForImageGeneration.from_pretrained("user/saved"))
pipe = DQPipeline.from_pretrained("user/pipeline", revision="dev")
keep("joint-pipeline", DQForImageGeneration.from_models(pipe.vae, pipe.transformer))
met["size"] = DQImageProcessor.from_pretrained("user/vae").size
met["cache below snapshots"] = [
    error_of(DQVAEModel.from_pretrained, repository, cache_dir=os.path.abspath("snapshots/cache"), **place)
    for repository, place in (("user/vae", {}), ("user/joint", {"subfolder": "vae"}))
]
DQPipeline.from_pretrained("user/joint").save_pretrained("pulled")
DQVAEModel.from_pretrained("user/joint", subfolder="vae").save_pretrained("part")

# What is not there.
for name, load, *place in (
    ("repository", DQVAEModel, "user/missing", {}),
    ("repository of a pipeline", DQPipeline, "user/missing", {}),
    ("repository of a processor", DQImageProcessor, "user/missing", {}),
    ("revision", DQForImageGeneration, "user/joint", {"revision": "nope"}),
    ("revision of a pipeline", DQPipeline, "user/joint", {"revision": "nope"}),
    ("sub-folder", DQVAEModel, "user/joint", {"subfolder": "nope"}),
    ("weights", DQForImageGeneration, "user/no-weights", {}),
    ("weights of a pipeline", DQPipeline, "user/no-weights", {}),
    ("shard", DQForImageGeneration, "user/no-shard", {}),
    ("index", DQPipeline, "user/vae", {}),
    ("processor", DQImageProcessor, "user/transformer", {}),
    ("name", DQVAEModel, "no name", {}),
    ("right", DQVAEModel, "other/private", {}),
    ("token", DQForImageGeneration, "other/private", {"token": False}),
    ("valid token", DQVAEModel, "other/private", {"token": "hf_wrong"}),
    ("token of a pipeline", DQPipeline, "other/private", {"token": False}),
):
    met[f"missing {name}"] = error_of(load.from_pretrained, place[0], **place[1])

# Connections that break while it downloads.
expected = joint.state_dict()
for load in (DQForImageGeneration, DQPipeline):
    for broken, (pattern, after_bytes) in tables["breaks"].items():
        if load is DQPipeline and "weights" not in broken:
            continue
        cache = f"cache-{load.__name__}-{broken}"
        met.setdefault("breaks", []).append([load.__name__, broken])
        for attempt in range(2):
            drop(method="GET", pattern=f"user/joint/.*{pattern}", after_bytes=after_bytes + attempt, times=15)
            met["breaks"][-1] += [error_of(load.from_pretrained, "user/joint", cache_dir=cache), drop()]
        again = load.from_pretrained("user/joint", cache_dir=cache)
        pulled = getattr(again, "vae").state_dict() | getattr(again, "transformer").state_dict()
        met["breaks"][-1].append(all(value.equal(pulled[key.partition(".")[2]]) for key, value in expected.items()))
        shutil.rmtree(cache)

# Answers that are not the file.
for name, answer in tables["answers"].items():
    for method in ("GET", "GET|HEAD"):
        drop(method=method, pattern="user/joint/resolve/.*model.safetensors", **({"headers": {}} | answer))
        for load in (DQForImageGeneration, DQPipeline):
            error = error_of(load.from_pretrained, "user/joint", cache_dir=f"cache-{name}")
            met.setdefault("answers", []).append([name, method, error])
        drop()

# Other people and damaged files.
joint.push_to_hub("user/race")
met["busy"] = error_of(joint.push_to_hub, "user/busy")
DQVAEModel.from_pretrained("user/pictures").save_pretrained("pictures")
(weights,) = Path("home/hub/models--user--pictures").rglob("model.safetensors")
weights.resolve().write_bytes(weights.read_bytes()[:1000])
met["damaged"] = [error_of(DQVAEModel.from_pretrained, "user/pictures", force_download=f) for f in (False, True)]

# What is there for the process without a network.
DQForImageGeneration.from_pretrained("user/joint")
for name, patterns in (("user/task", ["*.json", "*.safetensors"]), ("user/saved", ["*.json", "*.safetensors", "*.md"])):
    HfApi().snapshot_download(name, allow_patterns=patterns, cache_dir="cache-alone")
json.dump(met, open("met.json", "w"))
"""
)

OFFLINE = (
    PRELUDE
    + """
joint = DQForImageGeneration.from_pretrained("user/joint")
keep("joint-offline", joint)
joint.save_pretrained("offline")
pipe = DQPipeline.from_pretrained("user/joint")
seeded = dict(generator=__import__("torch").Generator().manual_seed(3))
images = [pipe(class_labels="moon", **seeded).images[0]]
images.append(pipeline("dq-generation", "user/joint")("moon", seed=3)["image"])
for image, name in zip(images, ("pipe", "task")):
    image.save(f"{name}.png")
met["size"] = DQImageProcessor.from_pretrained("user/joint").size
met["part"] = DQVAEModel.from_pretrained("user/joint", subfolder="vae").config.codebook_size
for name, load in (("model", DQForImageGeneration), ("pipeline", DQPipeline), ("processor", DQImageProcessor)):
    met[f"missing {name}"] = error_of(load.from_pretrained, "user/never-seen")
met["missing revision"] = error_of(DQForImageGeneration.from_pretrained, "user/joint", revision="nope")
met["push"] = error_of(joint.push_to_hub, "user/joint")
for name in ("user/task", "user/saved"):
    DQForImageGeneration.from_pretrained(name, cache_dir="cache-alone")
json.dump(met, open("met-offline.json", "w"))
"""
)


def read_weights(folder, prefix=""):
    """All tensors of a model's folder, or of one of its parts."""
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {f"{prefix}{key}": value for part in parts for key, value in part.items()}


def read_joint(folder):
    return read_weights(folder / "vae", "vae.") | read_weights(folder / "transformer", "transformer.")


def assert_equal(weights, expected):
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders of a tokenizer, of both stages with a card that was written by hand and a picture, and of other weights."""
    place = tmp_path_factory.mktemp("hub")
    vae, transformer = make_vae(), make_transformer(num_classes=3, id2label=NAMES)
    vae.save_pretrained(place / "vae")
    DQImageProcessor(size={"height": 16, "width": 16}).save_pretrained(place / "vae")
    joint = DQForImageGeneration.from_models(vae, transformer)
    joint.save_pretrained(place / "joint")
    Image.new("RGB", (8, 8), "red").save(place / "joint" / "samples.png")
    write_model_card(place / "joint", joint.config, title="tiny", data="Keep this notice.", license="mit")
    with torch.no_grad():
        for parameter in joint.parameters():
            parameter += 0.01
    joint.save_pretrained(place / "other")
    return place


@pytest.fixture(scope="module")
def hub(place):
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def met(hub, place):
    """What the first client met."""
    hub.add("user/owned", {"README.md": b"# Mine\n"})
    hub.add("user/licensed", {"README.md": b"---\nlicense: mit\n---\n"})
    hub.add("user/ours", {"README.md": f"# Of another model\n\n{MARK}\n".encode()})
    hub.add("other/private", place / "vae", private=True)
    hub.add("user/no-weights", place / "joint")
    files = hub.files("user/no-weights")
    del files["transformer/model.safetensors"]
    DQForImageGeneration.from_pretrained(place / "joint").save_pretrained(place / "shards", max_shard_size="50KB")
    hub.add("user/no-shard", place / "shards")
    files = hub.files("user/no-shard")
    del files[next(name for name in sorted(files) if name.startswith("vae/model-00002"))]
    tables = place / "tables.json"
    answers = {name: answer for name, (answer, _) in ANSWERS.items()}
    tables.write_text(json.dumps({"cuts": CUTS, "breaks": BREAKS, "answers": answers}))
    hub.add("user/race", {"README.md": f"# Of another model\n\n{MARK}\n".encode()})
    shards = {name: (place / "shards" / name).read_bytes() for name in files_of(place / "shards")}
    hub.intruders["user/race"] = [shards | {".eval_results/dq_hf.yaml": b"[]"}]
    hub.add("user/busy", {"notes.txt": b"0"})
    hub.intruders["user/busy"] = [{"notes.txt": b"%d" % number} for number in range(1, 20)]
    pictures = {f"{number}.png": b"picture" for number in range(2000)}
    card = "".join(f"![p]({name})\n<img " for name in pictures) + "![samples](samples.png)"
    hub.add("user/pictures", place / "vae")
    hub.add("user/pictures", pictures | {"README.md": card.encode(), "samples.png": b"samples"})
    run_client(hub, CLIENT, cwd=place, stdin=tables.read_text(), HF_HOME=str(place / "home"))
    return json.loads((place / "met.json").read_text())


@pytest.fixture(scope="module")
def offline(hub, place, met):
    """What a process without a network met, whose cache is the first client's; and what it said."""
    asked = len(hub.requests)
    home = {"HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"}
    done = run_client(hub, OFFLINE, cwd=place, stdin="{}", **home)
    assert len(hub.requests) == asked
    return json.loads((place / "met-offline.json").read_text()) | {"stderr": done.stderr}


def names_in(hub, name, revision="main"):
    return set(hub.files(name, revision)) - {".gitattributes"}


# Push


JOINT = {"config.json", "model_index.json", "preprocessor_config.json", "README.md", "samples.png"}
JOINT |= {f"{part}/{file}" for part in ("vae", "transformer") for file in ("config.json", "model.safetensors")}


def test_every_class_can_push(hub, met):
    assert names_in(hub, "user/vae") == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    for name, revision in (("user/joint", "main"), ("user/pipeline", "dev"), ("user/task", "main")):
        assert names_in(hub, name, revision) == JOINT
    assert names_in(hub, "user/pipeline") == set()  # it went to the branch
    assert (
        hub.repositories["models", "user/pipeline"].private and hub.repositories["models", "user/transformer"].private
    )
    assert not hub.repositories["models", "user/vae"].private
    vae = hub.repositories["models", "user/vae"]
    assert list(vae.messages.values()) == ["initial commit", "The tokenizer", "Upload DQImageProcessor"]
    assert list(vae.messages)[1] == met["commit"]
    assert len(hub.repositories["models", "user/joint"].snapshots) == 3  # one commit for each push


def test_what_was_pushed_comes_back_unchanged(place, met):
    expected = {"vae": read_weights(place / "vae"), "joint": read_joint(place / "joint")}
    expected["transformer"] = read_weights(place / "joint" / "transformer")
    pulled = sorted(place.glob("*.safetensors"))
    assert len(pulled) >= 7
    for path in pulled:
        assert_equal(load_file(path), expected[path.stem.partition("-")[0]])
    assert met["size"] == {"height": 16, "width": 16}


def test_a_card_and_its_pictures_go_to_the_hub_and_come_back(hub, place, met):
    card = (place / "joint" / "README.md").read_text()
    for name, revision in (("user/joint", "main"), ("user/joint", "pieces"), ("user/saved", "main")):
        files = hub.files(name, revision)
        there = files["README.md"].content.decode()
        assert there == card.replace('"path/to/this/folder"', f'"{name}"') and f'model="{name}"' in there
        assert files["samples.png"].content == (place / "joint" / "samples.png").read_bytes()
        assert not card_errors(there)
    joint = hub.files("user/joint")
    for file in ("README.md", "samples.png"):
        assert (place / "pulled" / file).read_bytes() == joint[file].content
    part = (place / "part" / "README.md").read_text()
    origin = (
        "Weights and configuration are those of the tokenizer of [tiny](https://huggingface.co/user/joint), whose card"
    )
    assert origin in part and "Keep this notice." in part and "base_model:\n- user/joint\n" in part
    assert (place / "part" / "origin" / "samples.png").read_bytes() == joint["samples.png"].content
    assert not card_errors(part)


def test_a_card_on_the_hub_stays_if_its_owner_wrote_it(hub, met):
    owned, licensed, ours = (
        hub.files(f"user/{name}")["README.md"].content.decode() for name in ("owned", "licensed", "ours")
    )
    assert owned == "# Mine\n" and "model.safetensors" in hub.files("user/owned")
    assert "license: mit" in licensed and "library_name: transformers" in licensed and "# vae\n" in licensed
    assert "Of another model" not in ours and 'from_pretrained("user/ours")' in ours


def test_weights_that_a_push_replaces_are_deleted(met):
    pieces, whole, again = ({name for name in names if "/model" in name} for names in met["over"])
    assert whole == {"vae/model.safetensors", "transformer/model.safetensors"}
    assert pieces == again and len(pieces) > 4 and not pieces & whole


def test_a_push_without_the_right_says_so(met):
    assert met["other's"].startswith("PermissionError: other/vae cannot be written: the token has no right to it;")
    assert met["read only"].startswith("PermissionError: user/new cannot be written: the token has no right to it;")
    assert met["unknown argument"].startswith("TypeError: unknown argument(s) shards; there are state_dict, max_shard")


@pytest.mark.parametrize("cut", CUTS)
def test_an_upload_that_is_cut_changes_nothing_on_the_hub(met, cut):
    error, left, is_the_old_model = met["cuts"][cut]
    assert re.match(
        "ConnectionError: the upload to user/cut failed: .* try again when the connection works", error, re.S
    )
    assert left < 20 and is_the_old_model


def test_an_upload_that_was_cut_works_when_it_is_repeated(hub, place, met):
    assert len(hub.repositories["models", "user/cut"].snapshots) == 3  # the Hub's own, the first, the last
    for name in ("vae", "transformer"):
        there = hub.files("user/cut")[f"{name}/model.safetensors"].content
        assert there == (place / "other" / name / "model.safetensors").read_bytes()


def test_a_push_after_which_nobody_has_a_mixture(hub, place, met):
    """Another model's commit came between the look at the repository and the push."""
    files = hub.files("user/race")
    assert {name for name in files if "/model" in name} == {"vae/model.safetensors", "transformer/model.safetensors"}
    for part in ("vae", "transformer"):
        weights = (place / "joint" / part / "model.safetensors").read_bytes()
        assert files[f"{part}/model.safetensors"].content == weights
    assert ".eval_results/dq_hf.yaml" not in files and "Of another model" not in files["README.md"].content.decode()
    assert re.match("OSError: the upload to user/busy failed: .*412", met["busy"], re.S)
    assert "config.json" not in hub.files("user/busy")


# Pull


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_is_not_the_file_is_told_as_the_servers(met, name):
    errors = [row[2] for row in met["answers"] if row[0] == name]
    assert len(errors) == 4
    for error in errors:
        assert re.match(ANSWERS[name][1], error, re.S) and "use_safetensors" not in error, error


def test_a_load_asks_for_no_more_than_the_model_has(hub, place, met):
    asked = [request.path for request in hub.requests if "user/pictures/resolve" in request.path]
    assert len({path.rpartition("/")[2] for path in asked}) <= 5
    names = {path.name for path in (place / "pictures").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "samples.png"}


def test_a_damaged_file_in_the_cache_is_named_with_the_remedy(met):
    assert re.match("OSError: .*model.safetensors is damaged .* force_download=True", met["damaged"][0])
    assert met["damaged"][1] is None


def test_a_cache_may_lie_below_a_folder_of_any_name(met):
    assert met["cache below snapshots"] == [None, None]


def test_all_files_of_a_model_are_of_one_commit(hub, met):
    resolved = [
        re.search("/resolve/([^/]+)/(.*)", request.path) for request in hub.requests if request.method == "GET"
    ]
    weights = [match[1] for match in resolved if match and "safetensors" in match[2]]
    assert len(weights) > 20 and all(re.fullmatch("[0-9a-f]{40}", revision) for revision in weights)


@pytest.mark.parametrize(
    ["what", "error"],
    [
        (
            "repository",
            "OSError: user/missing is no local folder, and as a repository .*: there is no http.*/user/missing, or it is private",
        ),
        (
            "repository of a pipeline",
            "OSError: user/missing is no local folder, .*: there is no http.*/user/missing, or it is private",
        ),
        (
            "repository of a processor",
            "OSError: user/missing is no local folder, .*: there is no http.*/user/missing, or it is private",
        ),
        (
            "revision",
            r"OSError: user/joint .*\(revision 'nope'\).* no such revision: see the branches at http.*/user/joint$",
        ),
        ("revision of a pipeline", r"OSError: user/joint .*\(revision 'nope'\).* no such revision"),
        ("sub-folder", "OSError: user/joint, revision 'main': there is no file nope/config.json"),
        (
            "weights",
            "OSError: user/no-weights, revision 'main': .*/transformer has no file named model.safetensors",
        ),
        (
            "weights of a pipeline",
            "OSError: user/no-weights, revision 'main': .*/transformer has no file named model.safetensors",
        ),
        ("shard", "OSError: user/no-shard.*/vae/model-00002-of-0000\\d.safetensors is not there"),
        (
            "index",
            "OSError: user/vae, revision 'main': .* has no file model_index.json; a pipeline needs the tokenizer and the generator",
        ),
        ("processor", "OSError: user/transformer, revision 'main': there is no file preprocessor_config.json"),
        ("name", 'OSError: no name is no local folder, .*: no repository can have this name; expected "user/name"'),
        (
            "right",
            "OSError: other/private is no local folder, and .*or it is private and the token is missing or has no right to it",
        ),
        (
            "token",
            "PermissionError: other/private .*or it is private and the token is missing .*hf auth login",
        ),
        ("valid token", "PermissionError: other/private .*: the token is not valid; run `hf auth login`"),
        ("token of a pipeline", "PermissionError: other/private .* the token is missing"),
    ],
)
def test_what_cannot_be_loaded_is_named(met, what, error):
    assert re.match(error, met[f"missing {what}"], re.S), met[f"missing {what}"]


@pytest.mark.parametrize("broken", BREAKS)
def test_a_download_that_breaks_loads_nothing_and_works_when_it_is_repeated(met, broken):
    rows = [row for row in met["breaks"] if row[1] == broken]
    assert [row[0] for row in rows] == ["DQForImageGeneration"] + ["DQPipeline"] * ("weights" in broken)
    for _, _, first, first_left, second, second_left, is_whole in rows:
        for error in (first, second):
            assert re.match(
                "ConnectionError: user/joint .* cannot be loaded: .* try again when the connection works", error, re.S
            )
        assert first_left < 15 and second_left < 15 and is_whole


def test_offline_mode_loads_from_the_cache(place, offline):
    assert_equal(load_file(place / "joint-offline.safetensors"), read_joint(place / "joint"))
    with Image.open(place / "pipe.png") as pipe, Image.open(place / "task.png") as task:
        assert pipe.tobytes() == task.tobytes()
    assert offline["size"] == {"height": 16, "width": 16} and offline["part"] == 16
    for file in ("README.md", "samples.png"):
        assert (place / "offline" / file).read_bytes() == (place / "pulled" / file).read_bytes()


def test_offline_mode_is_named_where_something_is_missing(offline):
    for name in ("model", "pipeline", "processor"):
        error = offline[f"missing {name}"]
        assert error.startswith(
            "ConnectionError: user/never-seen is no local folder, and as a repository (revision 'main')"
        )
        assert "unset HF_HUB_OFFLINE" in error
    assert (
        "user/joint is no local folder, and as a repository (revision 'nope') it cannot be loaded: it is not whole"
        in offline["missing revision"]
    )
    assert offline["push"].startswith("ConnectionError: user/joint cannot be uploaded in offline mode")
    warnings = re.findall(r"(?:no card|\S+\.png) of user/.*", offline["stderr"])
    assert set(warnings) == {
        "no card of user/task is in the cache; where this model is saved, it will have a new one",
        "samples.png of user/saved is not there; where this model is saved, it will be missing",
    }


# Folders


@pytest.mark.parametrize(
    ["old", "new"], [("1GB", "100KB"), ("100KB", "1GB"), ("100KB", "80KB")], ids=lambda size: size
)
def test_a_save_that_stops_anywhere_leaves_one_model_or_none(tmp_path, monkeypatch, old, new):
    """After every step of the replacing; the new model has other weights and another configuration."""
    before, after = make_vae(), make_vae(codebook_decay=0.9)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter += 1
    before.save_pretrained(tmp_path / "old", max_shard_size=old)
    replace, unlink = os.replace, Path.unlink
    outcomes = []
    for allowed in range(100):
        folder = shutil.copytree(tmp_path / "old", tmp_path / "model", dirs_exist_ok=False)
        left = allowed

        def step(action, *arguments, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return action(*arguments, **options)

        monkeypatch.setattr(os, "replace", lambda *arguments: step(replace, *arguments))
        monkeypatch.setattr(Path, "unlink", lambda *arguments, **options: step(unlink, *arguments, **options))
        try:
            after.save_pretrained(folder, max_shard_size=new)
        except KeyboardInterrupt:
            pass
        monkeypatch.undo()
        outcomes.append(outcome(folder, before, after))
        if left >= 0:
            break
        shutil.rmtree(folder)
    assert outcomes[0] == "old" and outcomes[-1] == "new"
    assert set(outcomes) == {"old", "none", "new"} and outcomes == sorted(outcomes, key=["old", "none", "new"].index)
    weights = sorted(path.name for path in folder.glob("model*"))
    assert weights == ["model.safetensors"] or (new != "1GB" and "model.safetensors" not in weights)


def outcome(folder, before, after):
    """Which model a folder holds."""
    try:
        loaded = DQVAEModel.from_pretrained(folder)
    except OSError:
        return "none"
    for name, model in (("old", before), ("new", after)):
        same = all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
        if same and loaded.config.codebook_decay == model.config.codebook_decay:
            return name
    return "a mixture"


def test_a_save_clears_away_what_a_killed_one_left(tmp_path):
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "model-00001-of-00002.safetensors").write_bytes(b"half")
    make_vae().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_only_weights_of_the_same_model_and_variant_are_stale():
    names = [
        "model.safetensors",
        "model.fp16.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    names += ["vae/model.safetensors", "adapter_model.safetensors", "model.fp16-00001-of-00002.safetensors"]
    names += ["model.safetensors.index.fp16.json", "my-model.safetensors", "config.json"]
    whole = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert stale_files(names, ["model.safetensors", "config.json"]) == whole
    pieces = ["model.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json"]
    assert stale_files(names, pieces) == ["model.fp16.safetensors", "model.fp16-00001-of-00002.safetensors"]
    assert stale_files(names, ["vae/model-00001-of-00001.safetensors"]) == ["vae/model.safetensors"]
    assert stale_files(names, ["adapter_model.safetensors", "config.json"]) == []
