"""Do variable-length codes describe images better than fixed-length ones of the same number, and generate them better?

    python benchmarks/dynamic_vs_fixed/run.py --smoke                # everything once, tiny: a minute
    python benchmarks/dynamic_vs_fixed/run.py                        # emoji: all tokenizers and generators, three seeds
    python benchmarks/dynamic_vs_fixed/photographs.py                # fetches the photographs, then
    python benchmarks/dynamic_vs_fixed/run.py --data photographs

Every finished run is a small JSON file in `results/<data>/`, and is not run again; the trained weights stay in
`--work_dir`. A run that was killed starts again alone: give the same command again. A folder of results holds runs of the
same settings only. `pilot.py` is how the learning rates and the number of steps were chosen; `evidence.py` makes the tables.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import conditions
import evidence
import stage_1
import stage_2
import torch
from conditions import CONDITIONS, IMAGE_SIZE
from evidence import REPOSITORY, option
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser

import dq_hf
from dq_hf.data.images import ImageCollator, load_images
from dq_hf.hub.folders import whole_file
from dq_hf.modeling.image_processing_dq import DQImageProcessor, to_bytes

HERE = Path(__file__).parent
DATA = {
    "emoji": REPOSITORY / "examples" / "data" / "emoji",
    "photographs": REPOSITORY / "runs" / "photographs",
}


@dataclass
class Arguments:
    data: list[str] = option(["emoji"], f"of {', '.join(DATA)}")
    stages: list[int] = option([1, 2], "1: tokenizers, 2: generators")
    conditions: list[str] = option([*CONDITIONS, *stage_2.GENERATORS], "which ones to run")
    seeds: list[int] = option([0, 1, 2], "of weights and order of images")
    steps: int = option(6000, "optimizer steps of a tokenizer")
    learning_rate: float = option(2e-3, "highest learning rate of a tokenizer")
    device: str = option("cpu", "where models are trained and measured")
    seconds: float = option(120.0, "time of training a generator, counted by stage_2.SECONDS_A_STEP")
    samples: int = option(384, "images that a generator samples")
    images: int | None = option(None, "the first images of each split only; none: all")
    smoke: bool = option(False, "everything tiny, from the start, in <work_dir>/smoke")
    work_dir: str = option(str(REPOSITORY / "runs" / "dynamic_vs_fixed"), "for the weights")
    results_dir: str = option(str(HERE / "results"), "folder of the results")


def main(args):
    for name, possible in (("data", DATA), ("stages", (1, 2)), ("conditions", [*CONDITIONS, *stage_2.GENERATORS])):
        if unknown := [value for value in getattr(args, name) if value not in possible]:
            raise ValueError(f"{name} must be of {', '.join(map(str, possible))}, got {unknown[0]}")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    if args.smoke:
        smoke(args)
        return
    for data in args.data:
        images, groups = {}, {}
        for split in ("train", "test"):
            images[split], groups[split] = load_split(DATA[data], split, args.images)
        folder = Path(args.results_dir, data)
        write_json(folder / "held_out.json", {"sha256": fingerprint(images["test"]), "groups": groups["test"]})
        for seed in args.seeds:
            for name in args.conditions:
                if name in CONDITIONS and 1 in args.stages:
                    run_tokenizer(args, data, images, name, seed)
                elif name in stage_2.GENERATORS and 2 in args.stages:
                    run_generator(args, data, images, name, seed)


def smoke(args):
    """All runs and the report, tiny and from the start."""
    place = Path(args.work_dir, "smoke")
    shutil.rmtree(place, ignore_errors=True)
    tiny = dict(data=["emoji"], seeds=[0], steps=2, seconds=0.5, samples=4, images=16, smoke=False)
    main(dataclasses.replace(args, **tiny, work_dir=str(place), results_dir=str(place / "results")))
    evidence.main(
        evidence.Arguments(
            results_dir=str(place / "results"), output=str(place / "evidence.md"), images_dir=str(place / "images")
        )
    )


def run_tokenizer(args, data, images, name, seed):
    """One run of stage 1, unless its result is there."""
    settings = common_settings(data, images, name, seed) | {
        "steps": args.steps,
        "batch_size": stage_1.BATCH_SIZE,
        "learning_rate": args.learning_rate,
    }
    condition = CONDITIONS[name]

    def train():
        if condition.taught is None:
            return stage_1.train(condition, images["train"], seed, args.steps, args.learning_rate, args.device)
        model = trained_tokenizer(args, data, name, condition.taught, seed)
        router_steps = min(args.steps, stage_1.ROUTER_STEPS)  # the latter, but in a trial
        return stage_1.teach_router(model, condition, images["train"], seed, router_steps)

    run(
        args,
        settings,
        train=train,
        make=lambda: conditions.make_model(condition),
        evaluate=lambda model: stage_1.evaluate(model, condition, images["test"], seed),
    )


def run_generator(args, data, images, name, seed):
    """One run of stage 2, unless its result is there; the tokenizer of the same seed must have been trained."""
    settings = common_settings(data, images, name, seed) | {
        "seconds": args.seconds,
        "batch_size": stage_2.BATCH_SIZE,
        "learning_rate": stage_2.LEARNING_RATE,
        "samples": args.samples,
    }

    def parts():
        vae = trained_tokenizer(args, data, name, stage_2.GENERATORS[name], seed)
        return vae, *stage_2.encode(vae, images["train"])

    def train():
        vae, codes, grain_maps = parts()
        steps = math.ceil(args.seconds / stage_2.SECONDS_A_STEP[name])
        return stage_2.train(codes, grain_maps, vae.config.codebook_size, seed, steps)

    def make():
        vae, codes, grain_maps = parts()
        return stage_2.make_model(codes, grain_maps, vae.config.codebook_size)

    run(
        args,
        settings,
        train=train,
        make=make,
        evaluate=lambda model: stage_2.evaluate(model, parts()[0], images["test"], args.samples, seed),
    )


def trained_tokenizer(args, data, name, tokenizer, seed):
    """The tokenizer that a run needs; FileNotFoundError if it was not trained yet."""
    weights = weights_path(args, data, tokenizer, seed)
    if not weights.exists():
        raise FileNotFoundError(f"{name} needs {weights}; run stage 1 of {tokenizer}, seed {seed} first")
    return load_weights(conditions.make_model(CONDITIONS[tokenizer]), weights).to(args.device)


def common_settings(data, images, name, seed):
    """What says, for both stages, which run it is."""
    return {
        "condition": name,
        "data": data,
        "data_sha256": {split: fingerprint(tensor) for split, tensor in images.items()},
        "seed": seed,
    }


def weights_path(args, data, name, seed):
    """File of a run's trained weights."""
    return Path(args.work_dir, data, f"{name}-seed{seed}.safetensors")


def run(args, settings, train, make, evaluate):
    """Train, unless the weights are there, and measure, unless the result is there.

    Args:
        train: gives a trained model and what to note about its training.
        make: gives an untrained model.
        evaluate: gives the figures of a model.
    """
    data, name, seed = (settings[key] for key in ("data", "condition", "seed"))
    result = Path(args.results_dir, data, f"{name}-seed{seed}.json")
    if result.exists():
        check_settings(result, {name: json.loads(result.read_text()).get(name) for name in settings}, settings)
        return
    print(f"{data}, {name}, seed {seed}", flush=True)
    weights = weights_path(args, data, name, seed)
    if not weights.exists():
        model, facts = train()
        save_weights(model, weights, {"settings": settings, "facts": facts})
    metadata = read_metadata(weights)
    check_settings(weights, metadata["settings"], settings)
    model = load_weights(make(), weights).to(args.device)
    write_json(
        result,
        settings
        | metadata["facts"]
        | {
            "num_parameters": model.num_parameters(),
            "config": model.config.to_diff_dict(),
            "versions": {"dq_hf": dq_hf.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "held_out": evaluate(model),
        },
    )


def check_settings(path, found, wanted):
    """Raise `ValueError` if a file is of a run with other settings: what is compared must differ in one thing alone."""
    if found != wanted:
        raise ValueError(f"{path} must be of a run with {wanted}, got {found}; remove it, or give other folders")


def load_split(folder, split, num_images=None):
    """Images (n, 3, 64, 64) in [-1, 1] of a split, and for each the number of its group.

    A group is what cannot count as several independent images: the tiles of one photograph (files named
    `<photograph>-<tile>.png`), or one concept in several styles (column `concept`).
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder} not found; make the photographs with photographs.py")
    dataset = load_images(folder, split)
    rows = list(dataset.select(range(min(num_images or len(dataset), len(dataset)))))
    names = [row.get("concept") or Path(row["image"]["path"]).name.rsplit("-", 1)[0] for row in rows]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    collate = ImageCollator(DQImageProcessor({"height": IMAGE_SIZE, "width": IMAGE_SIZE}))
    return collate(rows)["pixel_values"], [numbers[name] for name in names]


def fingerprint(images):
    """16 hex digits of the pixels."""
    return hashlib.sha256(to_bytes(images).contiguous().numpy().tobytes()).hexdigest()[:16]


def save_weights(model, path, metadata):
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state_dict = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    with whole_file(path) as partial:
        save_file(state_dict, partial, metadata={name: json.dumps(value) for name, value in metadata.items()})


def read_metadata(path):
    """What `save_weights` was given."""
    with safe_open(path, "pt") as file:
        return {name: json.loads(value) for name, value in file.metadata().items()}


def load_weights(model, path):
    """The model with trained weights, in evaluation mode."""
    model.load_state_dict(load_file(path))
    return model.eval()


def write_json(path, result):
    """Whole or not at all; a line for each field."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in result.items()]
    with whole_file(path) as partial:
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
