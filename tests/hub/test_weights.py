"""Loading refuses what would leave weights random, wrong or broken, and says which file and which key."""

import re

import pytest
import torch
from conftest import edit_config, make_vae
from safetensors.torch import load_file, save_file

from dq_hf.modeling.configuration_dqvae import DQVAEConfig
from dq_hf.modeling.modeling_dqvae import DQVAEModel


@pytest.fixture
def folder(tmp_path):
    """A saved model."""
    make_vae().save_pretrained(tmp_path)
    return tmp_path


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def set_value(weights, key, value):
    weights[key].view(-1)[0] = value


KEY = "decoder.conv_in.weight"
BAD_WEIGHTS = [
    (lambda weights: weights.pop(KEY), f"weights are missing: {KEY}"),
    (lambda weights: weights.pop("quantizer.codebook"), "weights are missing: quantizer.codebook"),
    (lambda weights: weights.update(extra=torch.zeros(1)), "weights that the model does not have: extra"),
    (
        lambda weights: weights.update({KEY: torch.zeros(3, 2)}),
        rf"another shape .*{KEY} \(3, 2\) instead of \(8, 8, 3, 3\)",
    ),
    (lambda weights: set_value(weights, KEY, torch.nan), f"weights are not finite: {KEY}"),
    (lambda weights: set_value(weights, "quantizer.embed_sum", torch.inf), "not finite: quantizer.embed_sum"),
    (lambda weights: weights.clear(), "weights are missing: decoder.* and [0-9]+ more"),
]


@pytest.mark.parametrize(("change", "message"), BAD_WEIGHTS)
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}])
def test_weights_that_do_not_fit_are_refused(folder, change, message, options):
    edit_weights(folder, change)
    with pytest.raises(
        ValueError, match=f"{re.escape(str(folder))}/model.safetensors does not fit DQVAEModel: .*{message}"
    ):
        DQVAEModel.from_pretrained(folder, **options)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.9999])
def test_a_truncated_file_is_refused_by_name(folder, share):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(OSError, match=rf"^{re.escape(str(path))} is damaged or incomplete .* save it again"):
        DQVAEModel.from_pretrained(folder)


def test_the_damaged_one_of_several_files_is_named(tmp_path):
    make_vae().save_pretrained(tmp_path, max_shard_size="50KB")
    path = sorted(tmp_path.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match=rf"^{re.escape(str(path))} is damaged"):
        DQVAEModel.from_pretrained(tmp_path)


def test_a_model_in_a_subfolder_is_named_with_it(tmp_path):
    make_vae().save_pretrained(tmp_path / "vae")
    assert isinstance(DQVAEModel.from_pretrained(tmp_path, subfolder="vae"), DQVAEModel)
    edit_weights(tmp_path / "vae", lambda weights: weights.pop(KEY))
    with pytest.raises(ValueError, match="/vae/model.safetensors does not fit"):
        DQVAEModel.from_pretrained(tmp_path, subfolder="vae")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(OSError, match=re.escape(name)):
        DQVAEModel.from_pretrained(folder)


def test_a_configuration_that_does_not_fit_the_weights_is_refused(folder):
    edit_config(folder / "config.json", codebook_size=20)
    with pytest.raises(ValueError, match=r"quantizer.codebook \(16, 8\) instead of \(20, 8\)"):
        DQVAEModel.from_pretrained(folder)


def test_a_configuration_of_another_kind_or_with_a_typo_is_refused(folder):
    edit_config(folder / "config.json", codebook_sise=20)
    with pytest.raises(ValueError, match="no field 'codebook_sise'; did you mean 'codebook_size'?"):
        DQVAEModel.from_pretrained(folder)
    edit_config(folder / "config.json", model_type="dqtransformer")
    with pytest.raises(ValueError, match="codebook_sise|model_type 'dqvae', got 'dqtransformer'"):
        DQVAEConfig.from_pretrained(folder)


def test_fields_given_at_loading_are_checked_and_used(folder):
    assert DQVAEModel.from_pretrained(folder, entropy_thresholds=[0.5]).router.thresholds.tolist() == [0.5]
    with pytest.raises(ValueError, match="entropy_thresholds must be 1 "):
        DQVAEModel.from_pretrained(folder, entropy_thresholds=[0.5, 0.6])
    with pytest.raises(TypeError, match="thresholds"):
        DQVAEModel.from_pretrained(folder, thresholds=[0.5])


def test_loading_info_is_given_on_request(folder):
    model, info = DQVAEModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, DQVAEModel) and not info["missing_keys"]
