"""A checkpoint of the paper's release as our folder: any DQ-VAE variant, or a DQ-Transformer with its first stage.

Everything that the release's configuration states twice, or that ours derives, is checked; a parameter that is neither
read nor known to have no effect on the model is an error. Nothing that the files name is run or imported.
"""

from pathlib import Path

from transformers.utils import logging

from ..hub.folders import check_output_folder
from ..hub.weights import weights_of
from ..modeling.configuration_dqvae import DQVAEConfig
from ..modeling.image_processing_dq import DQImageProcessor
from ..modeling.modeling_dq import DQForImageGeneration
from ..modeling.modeling_dqvae import DQVAEModel
from .checkpoint import read_state_dict
from .config import read_config
from .text import listed
from .weights import THRESHOLDS, transformer_state_dict, vae_state_dict

logger = logging.get_logger(__name__)


def convert_checkpoint(config_path, checkpoint_path, output_dir, force=False, thresholds_path=None, report=None):
    """Write a released checkpoint as a folder that `from_pretrained` reads, and give its model.

    Args:
        config_path: the release's `config.yml`. The table of entropy thresholds that it names (`json_path`) is looked
            for beside it and in the folders above it; where there is none, a published threshold is taken.
        checkpoint_path: the release's `model.ckpt`. Only the tensors in its `state_dict` are used, and no code of it.
        output_dir: new or empty folder.
        force: write into a folder that is not empty.
        thresholds_path: JSON table {percentile: entropy in nats} to take instead of `json_path`.
        report: called with a sentence for each value that is not in the files, a default or a published threshold;
            None: they are logged as warnings.

    Returns:
        A `DQVAEModel`, or, for a DQ-Transformer, a `DQForImageGeneration`; in evaluation mode.

    Raises:
        FileExistsError: `output_dir` is a file, or not empty.
        OSError: a file is missing, damaged or compressed.
        ValueError: a configuration that is incomplete, contradicts itself or asks for what we do not have, or a
            checkpoint that does not fit it; the message names the parameter or the keys.
    """
    output_dir = Path(output_dir)
    check_output_folder(output_dir, force)
    config, defaults = read_config(config_path, thresholds_path)
    state_dict = read_state_dict(checkpoint_path)
    try:
        model = make_model(config, state_dict)
    except ValueError as error:
        raise ValueError(f"{checkpoint_path} does not fit {config_path}: {error}") from None

    model.eval()
    model.save_pretrained(output_dir)
    if isinstance(model, DQVAEModel):
        DQImageProcessor.for_model(config).save_pretrained(output_dir)
    # What a model of the other kind left there would be taken for a part of this one, which is whole only now.
    for path in list(output_dir.iterdir()):
        is_stale = path.name == "model_index.json" if isinstance(model, DQVAEModel) else weights_of(path.name)
        if is_stale:
            path.unlink()
    for default in defaults:
        (report or logger.warning)(default)
    return model


def make_model(config, state_dict):
    """The model of a configuration with the release's weights, {key: tensor}."""
    if isinstance(config, DQVAEConfig):
        ours = vae_state_dict(state_dict, config)  # before anything is allocated for sizes that may not fit
        return load_vae(DQVAEModel(config), ours)
    others = [key for key in state_dict if not key.startswith(("first_stage_model.", "transformer."))]
    if others:
        raise ValueError(f"unknown keys {listed(sorted(others))}")
    vae = vae_state_dict(state_dict, config.vae_config, "first_stage_model.")
    transformer = transformer_state_dict(state_dict, config.transformer_config, "transformer.")
    model = DQForImageGeneration(config)
    load_vae(model.vae, vae)
    model.transformer.load_state_dict(transformer)
    return model


def load_vae(model, weights):
    """A new tokenizer with the weights of `vae_state_dict`; its thresholds are those of its configuration."""
    model.load_state_dict({THRESHOLDS: model.router.thresholds} | weights)
    return model
