"""A tokenizer with twice the codes, to go on training from: each code becomes two that lie close together.

    python examples/split_codebook.py --vae runs/vae/model --output_dir runs/vae-split
    accelerate launch examples/train_dqvae.py --start_from runs/vae-split --output_dir runs/vae-larger

Vector quantisers have been grown like this since Linde, Buzo and Gray (1980). All weights but the codebook stay, so that
training begins where the smaller tokenizer ended. Codes have another meaning: a generator has to be trained for them, from
nothing or from `examples/adopt_codes.py`.
"""

from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser

from dq_hf import DQVAEConfig, DQVAEModel
from dq_hf.loading import load_tokenizer

DISTANCE = 0.25  # of the two from the old one, in distances from that to its nearest neighbour


@dataclass
class Arguments:
    vae: str = field(metadata={"help": "folder or Hub id of a tokenizer, or of a model with one"})
    output_dir: str = field(metadata={"help": "folder for the new one"})
    seed: int = field(default=0, metadata={"help": "of the directions in which codes are split"})


def split(vae, seed=0):
    """A `DQVAEModel` with two codes for each of `vae`: code c becomes codes c and c + N, on both sides of it."""
    old = vae.quantizer
    larger = DQVAEModel(DQVAEConfig(**{**vae.config.to_dict(), "codebook_size": 2 * old.num_codes}))
    weights = {key: value for key, value in vae.state_dict().items() if not key.startswith("quantizer.")}
    distances = torch.cdist(old.codebook, old.codebook).fill_diagonal_(torch.inf).amin(1, keepdim=True)
    directions = torch.randn(old.codebook.shape, generator=torch.Generator().manual_seed(seed))
    offsets = DISTANCE * distances * torch.nn.functional.normalize(directions)
    codebook = torch.cat([old.codebook - offsets, old.codebook + offsets])
    uses = torch.cat([old.cluster_size, old.cluster_size]) / 2
    weights |= {
        "quantizer.codebook": codebook,
        "quantizer.cluster_size": uses,
        "quantizer.embed_sum": codebook * uses[:, None],
    }
    larger.load_state_dict(weights)
    return larger


def main():
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    larger = split(load_tokenizer(args.vae), args.seed)
    larger.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {larger.config.codebook_size} codes")


if __name__ == "__main__":
    main()
