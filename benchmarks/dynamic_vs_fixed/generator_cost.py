"""CPU seconds that a step of each generator takes, all in turn in one process: the constants of stage_2.py.

    python benchmarks/dynamic_vs_fixed/generator_cost.py

On the grain maps that a trained tokenizer gives, too, for the entropy router learns nothing; the codes are untrained.
"""

import statistics
from dataclasses import dataclass

import conditions
import run
import stage_2
import torch
from evidence import option
from transformers import HfArgumentParser

from dq_hf.training.calibration import calibrate


@dataclass
class Arguments:
    images: int = option(2048, "the first ones of the training split")
    rounds: int = option(9, "measurements of each generator")
    steps: int = option(15, "of one measurement")


def main(args):
    torch.set_num_threads(1)
    images, _ = run.load_split(run.DATA["emoji"], "train", args.images)
    trainings = {name: training(tokenizer, images) for name, tokenizer in stage_2.GENERATORS.items()}
    seconds = {name: [] for name in trainings}
    clock = stage_2.clock_of(images.device)
    for _ in range(args.rounds + 1):
        for name, step in trainings.items():
            start = clock()
            for _ in range(args.steps):
                next(step)
            seconds[name].append((clock() - start) / args.steps)
    for name, values in seconds.items():
        print(f"{name}: {statistics.median(values[1:]):.4f} s a step, {min(values[1:]):.4f} to {max(values[1:]):.4f}")


def training(tokenizer, images):
    """An iterator that does one step of training whenever it is asked for the next."""
    condition = conditions.CONDITIONS[tokenizer]
    vae = conditions.make_model(condition).eval()
    if condition.router == "entropy":
        calibrate(vae, images.split(256), condition.shares)
    codes, grain_maps = stage_2.encode(vae, images)
    model = stage_2.make_model(codes, grain_maps, vae.config.codebook_size).train()
    optimizer = torch.optim.AdamW(model.parameters(), stage_2.LEARNING_RATE)
    for rows in stage_2.batches_of_similar_length(grain_maps, seed=0):
        yield stage_2.train_step(model, optimizer, codes[rows], grain_maps[rows])


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    main(arguments)
