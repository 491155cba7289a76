"""A tokenizer, or both models, wherever they are given: folders and repositories of either kind."""

import re

import pytest
import torch
from conftest import make_transformer, make_vae
from hub_server import HubServer, run_client

from dq_hf import DQConfig, DQForImageGeneration, DQVAEModel
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
