"""Whether samples can be recognised as members of their class: how often a classifier that knows real images says so.

    pip install -c constraints.txt -e ".[metrics]"
    python benchmarks/class_accuracy.py --output docs/evaluation.md      # one CPU thread, about three minutes

The classifier is logistic regression on an extractor's features of the training images. Asked about held-out images, too,
and about their reconstructions, it shows how good it is itself.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from report import write_section
from transformers import HfArgumentParser

from dq_hf import DEFAULT_MODEL
from dq_hf.data.images import class_names
from dq_hf.loading import load_pipeline
from dq_hf.metrics.references import ReferenceImages
from dq_hf.metrics.streaming import unit_images
from dq_hf.modeling.image_processing_dq import from_bytes, to_bytes
from dq_hf.networks.extractors import make_extractor

PENALTY = 1e-3  # of the classifier's squared weights


@dataclass
class Arguments:
    model: str = field(default=DEFAULT_MODEL, metadata={"help": "folder or repository of both models, with classes"})
    data: str = field(
        default="examples/data/emoji", metadata={"help": "images of these classes, with splits train and test"}
    )
    label_column: str = field(default="category", metadata={"help": "of the images"})
    extractor: str = field(default="efficientnet-lite0", metadata={"help": "as for make_extractor"})
    samples_per_class: int = field(default=50, metadata={"help": "samples of each class, seed 0"})
    batch_size: int = field(default=32, metadata={"help": "images at a time"})
    threads: int = field(default=1, metadata={"help": "CPU threads"})
    output: str | None = field(default=None, metadata={"help": "Markdown file to put the table into"})


@torch.no_grad()
def main(args):
    torch.set_num_threads(args.threads)
    PartialState()
    pipe = load_pipeline(args.model)
    extractor = make_extractor(args.extractor)

    def features_of(batches):
        return torch.cat([extractor.features(unit_images(images).float()) for images in batches])

    train, test = (ReferenceImages(pipe.vae, args.data, split) for split in ("train", "test"))
    names = [name for _, name in sorted(pipe.transformer.config.id2label.items())]
    train_labels, test_labels = (labels_of(images.dataset, args.label_column, names) for images in (train, test))
    classify = fit(features_of(images for _, images in train.batches(args.batch_size)), train_labels)

    held_out = [images for _, images in test.batches(args.batch_size)]
    sample_labels = torch.arange(len(names)).repeat_interleave(args.samples_per_class)
    shares = {
        name: class_shares(classify(features_of(batches)), labels, len(names))
        for name, batches, labels in (
            ("held-out images", held_out, test_labels),
            ("their reconstructions", (reconstruct(pipe.vae, images) for images in held_out), test_labels),
            ("samples", sample(pipe, sample_labels.tolist(), args.batch_size), sample_labels),
        )
    }
    report = make_report(args, extractor.description, names, test_labels, shares)
    print(report)
    if args.output is not None:
        write_section(Path(args.output), "benchmarks/class_accuracy.py", report)


def labels_of(dataset, label_column, names):
    """The model's class ids of a data set's images, (N,) long."""
    theirs = class_names(dataset, label_column)
    if sorted(theirs) != sorted(names):
        raise ValueError(f"the images' classes must be the model's, {', '.join(names)}; got {', '.join(theirs)}")
    return torch.tensor([names.index(theirs[label]) for label in dataset[:][label_column]])


@torch.enable_grad()
def fit(features, labels):
    """A function from features (N, D) to class ids (N,): logistic regression, which has one optimum."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    linear = torch.nn.Linear(features.shape[1], int(labels.max()) + 1)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logits = linear((features - mean) / std)
        value = torch.nn.functional.cross_entropy(logits, labels) + PENALTY * linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return lambda others: linear((others - mean) / std).argmax(1)


def reconstruct(vae, images):
    """Images uint8 (B, 3, H, W) through the tokenizer and back."""
    return to_bytes(vae.decode_codes(vae.encode(from_bytes(images)).codes).sample)


def sample(pipe, labels, batch_size):
    """Samples of these classes with the model's sampling defaults, batches uint8 (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    for first in range(0, len(labels), batch_size):
        images = pipe(class_labels=labels[first : first + batch_size], generator=generator).images
        yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def class_shares(predicted, labels, num_classes):
    """Share of each class's images (num_classes,) that the classifier gives its label."""
    return torch.stack([(predicted[labels == label] == label).double().mean() for label in range(num_classes)])


def make_report(args, description, names, test_labels, shares):
    """A Markdown table, and how it was made."""
    num_images = torch.bincount(test_labels, minlength=len(names)).tolist()
    lines = [
        f"Share that is classified right; {sum(num_images)} held-out images, {args.samples_per_class} samples a class, "
        f"seed 0; {description}.",
        "",
        f"| class | number held out | {' | '.join(shares)} |",
        f"|---|---:|{'---:|' * len(shares)}",
    ]
    for label, name in enumerate(names):
        each = " | ".join(f"{share[label]:.2f}" for share in shares.values())
        lines.append(f"| {name} | {num_images[label]} | {each} |")
    means = " | ".join(f"{share.mean():.2f}" for share in shares.values())
    return "\n".join([*lines, f"| mean of the classes | | {means} |"])


if __name__ == "__main__":
    main(HfArgumentParser(Arguments).parse_args_into_dataclasses()[0])
