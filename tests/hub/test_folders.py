"""Files and folders are whole or not there, and links do not lead out of a model's folder."""

import os
from pathlib import Path

import pytest
from conftest import make_transformer, make_vae

from dq_hf import DQForImageGeneration, DQPipeline, DQVAEModel
from dq_hf.hub.folders import check_place, put_in_place, recover, whole_file, whole_folder
from dq_hf.hub.upload import upload


def test_a_file_is_replaced_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / ("n" * 250 + ".txt")  # as long as a name can be
    for text in ("old", "new"):
        with whole_file(path) as partial:
            partial.write_text(text)
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_file_and_a_folder_are_written_through_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("file", "folder"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    for _ in range(2):
        with whole_file(tmp_path / "file") as partial:
            partial.write_text("new")
        with whole_folder(tmp_path / "folder") as partial:
            (partial / "inside").write_text("new")
    assert (tmp_path / "file").is_symlink() and (tmp_path / "folder").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["file", "folder"]


def test_places_that_nothing_can_be_put_in_are_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "to proc").symlink_to("/proc")
    (tmp_path / "nowhere yet").symlink_to(tmp_path / "a" / "b")
    for place in (tmp_path / "new", tmp_path / "a" / "b" / "c", tmp_path, tmp_path / "nowhere yet", tmp_path / "file"):
        check_place(place)
    for place in ("/proc", tmp_path / "to proc"):
        with pytest.raises(OSError, match=f"{place} is a mount point"):
            check_place(place)
    with pytest.raises(OSError, match="file is no folder that can be written"):
        check_place(tmp_path / "file" / "new")


def test_a_folder_is_replaced_whole_wherever_it_stops(tmp_path, monkeypatch):
    rename, outcomes = Path.rename, []
    for allowed in range(4):
        place = tmp_path / str(allowed)
        with whole_folder(place / "model") as partial:
            (partial / "old").touch()
        left = allowed

        def step(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return rename(*arguments)

        monkeypatch.setattr(Path, "rename", step)
        try:
            with whole_folder(place / "model") as partial:
                (partial / "new").touch()
        except KeyboardInterrupt:
            pass
        monkeypatch.undo()
        recover(place)
        outcomes += [path.name for path in (place / "model").iterdir()]
    assert outcomes == ["old", "old", "new", "new"]
    put_again = tmp_path / "0"
    assert (put_again / "partial-model").is_dir()
    put_in_place(put_again / "model")
    assert os.listdir(put_again) == ["model"] and os.listdir(put_again / "model") == ["new"]


@pytest.fixture
def joint(tmp_path):
    """A saved folder whose card shows a picture, and a private file beside it."""
    model = DQForImageGeneration.from_models(make_vae(), make_transformer())
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("![samples](samples.png)")
    (tmp_path / "private").write_bytes(b"private")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "name", ["samples.png", "README.md", "config.json", "vae/config.json", "vae/model.safetensors"]
)
def test_a_link_that_leaves_the_folder_is_refused_when_it_is_read(joint, name):
    path = joint / name
    if path.exists():
        (joint.parent / "private").write_bytes(path.read_bytes())
        path.unlink()
    path.symlink_to(joint.parent / "private")
    loads = [lambda: DQForImageGeneration.from_pretrained(joint), lambda: DQPipeline.from_pretrained(joint)]
    loads += [lambda: DQVAEModel.from_pretrained(joint / "vae"), lambda: upload(joint, "user/name", "message")]
    for load in loads:
        with pytest.raises(OSError, match=f"{path} is a link that leaves"):
            load()


def test_a_part_that_is_a_link_is_refused_and_links_inside_are_not(joint):
    (joint / "vae").rename(joint.parent / "vae")
    (joint / "vae").symlink_to(joint.parent / "vae")
    for load in (DQForImageGeneration, DQPipeline):
        with pytest.raises(OSError, match=f"{joint / 'vae'} is a link that leaves"):
            load.from_pretrained(joint)
    (joint / "vae").unlink()
    (joint.parent / "vae").rename(joint / "vae")
    (joint / "vae" / "model.safetensors").rename(joint / "vae" / "weights")
    (joint / "vae" / "model.safetensors").symlink_to("weights")
    (joint.parent / "link").symlink_to(joint)
    assert isinstance(DQForImageGeneration.from_pretrained(joint.parent / "link"), DQForImageGeneration)


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "config.json"])
def test_a_link_that_leaves_the_folder_is_refused_when_it_is_written(tmp_path, name):
    (tmp_path / "model").mkdir()
    (tmp_path / "private").write_bytes(b"private")
    (tmp_path / "model" / name).symlink_to(tmp_path / "private")
    with pytest.raises(OSError, match=f"{tmp_path / 'model' / name} is a link that leaves"):
        make_vae().save_pretrained(tmp_path / "model")
    assert os.listdir(tmp_path / "model") == [name] and (tmp_path / "private").read_bytes() == b"private"
