"""A tokenizer, or both models, wherever they are given: folders and repositories of either kind."""

import re
from argparse import Namespace

import pytest
import torch
from conftest import make_transformer, make_vae
from hub_server import HubServer, run_client

from dq_hf import DQConfig, DQForImageGeneration, DQImageProcessor, DQVAEModel
from dq_hf.commands.calibrate import run as calibrate
from dq_hf.loading import load_models, load_pipeline, load_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders "vae" and "both", with one tokenizer."""
    root = tmp_path_factory.mktemp("folders")
    vae = make_vae()
    vae.save_pretrained(root / "vae")
    DQForImageGeneration.from_models(vae, make_transformer()).save_pretrained(root / "both")
    return root


def test_a_tokenizer_is_found_in_either_kind_of_folder(folders):
    weights = [load_tokenizer(folders / name).state_dict() for name in ("vae", "both")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    vae, pipe = load_models(folders / "both")
    assert pipe.vae is vae and not vae.training
    assert load_models(folders / "vae")[1] is None
    assert load_pipeline(folders / "both").transformer.config.codebook_size == vae.config.codebook_size


def test_a_folder_of_both_names_the_subfolder_where_a_tokenizer_is_loaded_by_its_class(folders):
    with pytest.raises(ValueError, match='subfolder="vae"') as refusal:
        DQVAEModel.from_pretrained(folders / "both")
    assert "both/config.json" in str(refusal.value)
    DQVAEModel.from_pretrained(folders / "both", subfolder="vae")
    with pytest.raises(ValueError, match="model_type 'dq', got 'dqvae'"):
        DQConfig.from_pretrained(folders / "vae")


LOADS = {
    "tokenizer": load_tokenizer,
    "models": load_models,
    "pipeline": load_pipeline,
    "part": lambda folder: DQVAEModel.from_pretrained(folder, subfolder="vae"),
    "both": DQForImageGeneration.from_pretrained,
    "processor": DQImageProcessor.from_pretrained,
    "calibration": lambda folder: calibrate(Namespace(model=folder, batch_size=1)),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_the_folder_of_a_training_run_is_refused_with_that_of_its_model(folders, tmp_path, load):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(folders / "both")
    with pytest.raises(
        OSError, match="run has no .*json: it is the folder of a training run; give its model, .*run/model"
    ):
        load(tmp_path / "run")


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(OSError, match=f"{tmp_path} has no config.json; give the folder of a saved model"):
        load_models(tmp_path)


CLIENT = """
from dq_hf.loading import load_models, load_tokenizer
for name in ("vae", "both"):
    print(load_tokenizer(f"user/{name}").config.codebook_size)
print(load_models("user/vae")[1] is None)
"""
FETCH_BOTH = """
from dq_hf.loading import load_models
print(load_models("user/both")[1] is None)
"""


def test_a_repository_is_read_at_one_commit_and_no_further_than_is_needed(folders):
    with HubServer() as hub:
        hub.add("user/vae", folders / "vae")
        hub.add("user/both", folders / "both")
        assert run_client(hub, CLIENT).stdout.split() == ["16", "16", "True"]
        fetched = [re.search("/resolve/([^/]+)/(.*)", request.path) for request in hub.requests]
        assert not [found for found in fetched if found and found[2] == "transformer/model.safetensors"]
        assert run_client(hub, FETCH_BOTH).stdout.split() == ["False"]
        fetched = [re.search("/resolve/([^/]+)/(.*)", request.path) for request in hub.requests]
    commits = {found[1] for found in fetched if found}
    assert len(commits) == 2 and all(re.fullmatch("[0-9a-f]{40}", commit) for commit in commits)  # one a repository
