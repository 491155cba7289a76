"""`dq-hf calibrate`: the router's thresholds for the images of a data set."""

from pathlib import Path

from .options import add_command, add_data_options, check_at_least_one, read_images


def register(commands):
    command = add_command(commands, "calibrate", run, "Fit a router's thresholds to a data set.")
    command.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="Write the thresholds into the weights of this folder.",
    )
    add_data_options(command, split="train")
    command.add_argument(
        "--fine-ratio",
        type=float,
        nargs="+",
        default=[0.5],
        help="Aim at this share of the regions at each granularity but the coarsest (default 0.5).",
    )


def run(args):
    check_at_least_one(batch_size=args.batch_size)
    from ..hub.download import refuse_run_folder

    folder = Path(args.model)
    refuse_run_folder(folder, "config.json")
    if not (folder / "config.json").is_file():
        raise OSError(f"--model must be a local folder with a config.json, got {folder}; download the model first")

    from ..hub.card import renew_card
    from ..loading import look_into
    from ..modeling.grain_map_dq import check_shares
    from ..public import DQForImageGeneration, DQVAEModel
    from ..training.calibration import calibrate, save_thresholds

    holds_both, _ = look_into(folder)
    model = (DQForImageGeneration if holds_both else DQVAEModel).from_pretrained(folder)
    vae = model.vae if holds_both else model
    config = vae.config
    if len(config.granularities) == 1:
        raise ValueError(
            f"{folder} must hold a DQ-VAE with a router that chooses; one with a single granularity has no thresholds"
        )
    shares = check_shares("--fine-ratio", args.fine_ratio, len(config.granularities))
    images, loader = read_images(args, config)
    achieved = calibrate(vae, (batch["pixel_values"] for batch in loader), shares)
    config.budget_targets = shares
    save_thresholds(folder, vae.router.thresholds, shares)
    renew_card(folder, model)
    unit = " nats" * (config.router == "entropy")
    print(f"thresholds  {' '.join(f'{value:.7f}' for value in vae.router.thresholds)}{unit}")
    num_images = images.num_rows - images.num_broken
    print(f"achieved    {' '.join(f'{share:.4f}' for share in achieved)} of the regions of {num_images} images")
    print(f"written     into the weights of {folder}")
