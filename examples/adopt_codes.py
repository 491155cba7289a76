"""A generator for one tokenizer's codes, to go on training from, out of a generator for another's.

    python examples/adopt_codes.py --model runs/transformer/model --vae runs/vae-larger/model --data path/to/images \
        --text_length 12 --output_dir runs/adopted
    accelerate launch examples/train_dqtransformer.py --start_from runs/adopted --vae runs/vae-larger/model \
        --data path/to/images --caption_column captions --text_encoder small --output_dir runs/transformer-larger

Both tokenizers code the same images in the same grain maps. The rows of a new code in embedding and head are then means of
the old rows, weighted by how often each old code stands where the new one does. Grids must be the same; all layers are
taken over, of the start tokens the last one: that of no class, where there is one. Classes and text of the old generator
are not: the new one has no classes, and with `--text_length` an untrained text prefix.
"""

from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from dq_hf import DQForImageGeneration, DQImageProcessor, DQTransformerConfig, DQTransformerForImageGeneration
from dq_hf.data.images import ImageCollator, load_images
from dq_hf.loading import load_tokenizer
from dq_hf.modeling.grain_map_dq import expand_grain_map


@dataclass
class Arguments:
    model: str = field(metadata={"help": "folder or Hub id of a tokenizer with its generator"})
    vae: str = field(metadata={"help": "the new tokenizer"})
    data: str = field(metadata={"help": "images that both know: a folder, Parquet files, or a data set of the Hub"})
    output_dir: str = field(metadata={"help": "folder for the new generator"})
    train_split: str = "train"
    num_images: int = field(default=1536, metadata={"help": "of them, drawn at random, are coded"})
    text_length: int | None = field(
        default=None, metadata={"help": "slots for the tokens of a text, if it shall read one"}
    )
    text_hidden_size: int = field(default=128, metadata={"help": "width of its text encoder's states"})
    dropout: float = field(default=0.0, metadata={"help": "of embeddings and residual connections"})
    seed: int = field(default=0, metadata={"help": "of the draw, and of the text prefix"})


@torch.no_grad()
def common_codes(old, new, images):
    """How often (codes of `new`, codes of `old`) they stand at the same place; a code counts once, coarse or fine."""
    counts = torch.zeros(new.config.codebook_size, old.config.codebook_size)
    collate = ImageCollator(DQImageProcessor.for_model(new.config))
    for batch in tqdm(DataLoader(images, 32, collate_fn=collate)):
        encoded = new.encode(batch["pixel_values"])
        codes = old.encode(batch["pixel_values"], grain_map=encoded.grain_map).codes
        weights = new.cell_weights(expand_grain_map(encoded.grain_map, len(new.config.granularities))).flatten()
        counts.index_put_((encoded.codes.flatten(), codes.flatten()), weights, accumulate=True)
    return counts


def adopt(generator, counts, **changes):
    """A `DQTransformerForImageGeneration` for the new codes; `changes` of its configuration."""
    sizes = generator.config.to_dict() | {"num_classes": 0, "id2label": {}, "label2id": {}, "class_dropout": 0.0}
    sizes |= {"text_length": None, "text_hidden_size": None, "sampling_defaults": {}, "codebook_size": len(counts)}
    model = DQTransformerForImageGeneration(DQTransformerConfig(**sizes | changes))
    weights = model.state_dict()
    shares = (counts + 1e-3) / (counts + 1e-3).sum(1, keepdim=True)  # a code never seen takes all old ones alike
    num_codes = counts.shape[1]
    for name, old in generator.state_dict().items():
        if name not in weights or name.startswith("text_prefix."):
            continue
        if name in ("content_embedding.weight", "content_head.projection.weight"):
            weights[name] = torch.cat([shares @ old[:num_codes], old[num_codes : num_codes + 2], old[-1:]])
        elif len(old) > len(weights[name]):  # positions, pad, end and the starts of classes
            weights[name] = torch.cat([old[: len(weights[name]) - 1], old[-1:]])
        else:
            weights[name] = old
    model.load_state_dict(weights)
    return model


def main():
    args = HfArgumentParser(Arguments).parse_args_into_dataclasses()[0]
    torch.manual_seed(args.seed)
    old, vae = DQForImageGeneration.from_pretrained(args.model), load_tokenizer(args.vae)
    if vae.config.grid_sizes != old.vae.config.grid_sizes:
        raise ValueError(
            f"expected a tokenizer with the grids of the model's, {old.vae.config.grid_sizes}, got "
            f"{vae.config.grid_sizes}; train a new generator for it"
        )
    images = load_images(args.data, args.train_split)
    images = images.shuffle(seed=args.seed).select(range(min(args.num_images, len(images))))
    changes = {"embedding_dropout": args.dropout, "residual_dropout": args.dropout}
    if args.text_length is not None:
        changes |= {"text_length": args.text_length, "text_hidden_size": args.text_hidden_size}
    adopt(old.transformer, common_codes(old.vae, vae, images), **changes).save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
