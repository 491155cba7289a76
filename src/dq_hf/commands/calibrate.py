"""`dq-hf calibrate`: the router's thresholds for the images of a data set."""

from pathlib import Path

from .images import add_budget_option, add_data_options, budget, calibrate_router
from .options import add_command, check_at_least_one


def register(commands):
    command = add_command(commands, "calibrate", run, "Fit a router's thresholds to a data set.")
    command.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="Write the thresholds into the weights of this folder.",
    )
    add_data_options(command, split="train")
    add_budget_option(command)


def run(args):
    check_at_least_one(batch_size=args.batch_size)
    from ..hub.download import refuse_run_folder

    folder = Path(args.model)
    refuse_run_folder(folder, "config.json")
    if not (folder / "config.json").is_file():
        raise OSError(f"--model must be a local folder with a config.json, got {folder}; download the model first")

    from ..hub.card import renew_card
    from ..hub.download import model_type_of
    from ..public import DQConfig, DQForImageGeneration, DQVAEModel
    from ..training.calibration import save_thresholds

    kind, _ = model_type_of(folder)
    model = (DQForImageGeneration if kind == DQConfig.model_type else DQVAEModel).from_pretrained(folder)
    vae = getattr(model, "vae", model)
    if len(vae.config.granularities) == 1:
        raise ValueError(
            f"{folder} must hold a DQ-VAE with a router that chooses; one with a single granularity has no thresholds"
        )
    shares = budget(args, vae.config)
    calibrate_router(args, vae, shares)
    save_thresholds(folder, vae.router.thresholds, shares)
    renew_card(folder, model)
    print(f"written     into the weights of {folder}")
