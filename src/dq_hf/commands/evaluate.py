"""`dq-hf evaluate`: figures of a model on a data set, as a table and as a report in JSON."""

from pathlib import Path

from .. import DEFAULT_MODEL
from ..pipelines.seeds import check_seed
from .images import add_fine_ratio_option, add_source_options
from .options import add_command, add_force_option, add_group, check_at_least_one, check_output
from .sampling import add_sampling_options, chosen_sampling


def register(commands):
    kinds = add_group(commands, "evaluate", "kind", "Measure a model, as a table and as a report in JSON.")
    register_reconstruction(kinds)
    register_generation(kinds)
    register_likelihood(kinds)


def register_reconstruction(kinds):
    command = add_command(
        kinds,
        "reconstruction",
        run_reconstruction,
        "Measure what encoding and decoding images loses, and what it takes.",
    )
    add_report_options(command)
    add_extractor_option(command)
    add_num_images_option(command)
    command.add_argument(
        "--perceptual",
        default="auto",
        help="Measure the perceptual distance by lpips, by efficientnet-lite0, or, with auto, by the first whose weights "
        "are available (default auto).",
    )
    add_fine_ratio_option(command)


def register_generation(kinds):
    command = add_command(
        kinds,
        "generation",
        run_generation,
        "Compare samples with real images; `accelerate launch -m dq_hf evaluate generation` shares the work out among "
        "processes.",
    )
    add_report_options(command)
    add_extractor_option(command)
    command.add_argument(
        "-n", "--num-images", type=int, help="Draw this many samples (default: as many as there are real images)."
    )
    command.add_argument(
        "--num-references", type=int, help="Compare with this many real images, drawn by the seed (default: all)."
    )
    command.add_argument(
        "--image-dir",
        type=Path,
        metavar="DIR",
        help="Keep the samples in this folder, from which an interrupted run goes on (default: beside the report).",
    )
    command.add_argument(
        "--class-labels",
        choices=("reference", "balanced"),
        default="reference",
        help="Sample the classes of the real images, in a mixed order, or every class in turn (default reference).",
    )
    add_condition_options(command)
    add_sampling_options(command)


def register_likelihood(kinds):
    command = add_command(
        kinds,
        "likelihood",
        run_likelihood,
        "Measure the generator's code length of real images, in nats and bits an image, by kind of element.",
    )
    add_report_options(command)
    add_num_images_option(command)
    add_condition_options(command)


def add_num_images_option(command):
    """-n, of real images."""
    command.add_argument(
        "-n", "--num-images", type=int, help="Measure this many images, drawn by the seed (default: all)."
    )


def add_condition_options(command):
    """Where classes and captions of the images are."""
    command.add_argument(
        "--label-column", default="label", help="Read classes from this column (default %(default)s)."
    )
    command.add_argument(
        "--caption-column",
        help="Read captions from this column, for a model with text; of several one is drawn by the seed (default: no "
        "text).",
    )


def add_report_options(command):
    """What every evaluation asks for."""
    command.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="Measure this model, a folder or a repository of the Hub (default: the embedded emoji model).",
    )
    add_source_options(command, split="test")
    command.add_argument(
        "--seed", type=int, default=0, help="Draw images and samples by this seed (default %(default)s)."
    )
    command.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="REPORT.json",
        help="Write the report here: figures, and how they were made.",
    )
    add_force_option(command, "Overwrite a report that exists.")


def add_extractor_option(command):
    """--extractor."""
    command.add_argument(
        "--extractor",
        default="auto",
        help="Take features from inception-v3, from efficientnet-lite0, or, with auto, from the first whose weights are "
        "available (default auto).",
    )


def run_reconstruction(args):
    check_report(args)

    from ..loading import load_tokenizer
    from ..metrics.reconstruction import evaluate_reconstruction
    from ..modeling.grain_map_dq import check_shares

    vae = load_tokenizer(args.model)
    if args.fine_ratio is not None:
        check_shares("--fine-ratio", args.fine_ratio, len(vae.config.granularities))
    finish_report(
        args,
        evaluate_reconstruction(
            vae,
            model_name(args.model),
            args.data,
            args.split,
            fine_ratio=args.fine_ratio,
            extractor=args.extractor,
            perceptual=args.perceptual,
            **chosen(args),
        ),
    )


def run_generation(args):
    check_report(args)
    sampling = chosen_sampling(args)

    from ..loading import load_pipeline
    from ..metrics.generation import evaluate_generation

    finish_report(
        args,
        evaluate_generation(
            load_pipeline(args.model),
            model_name(args.model),
            args.data,
            args.split,
            args.image_dir or args.output.with_suffix(""),
            label_rule=args.class_labels,
            sampling=sampling,
            extractor=args.extractor,
            **chosen(args, "num_references", "label_column", "caption_column"),
        ),
    )


def run_likelihood(args):
    check_report(args)

    from ..loading import load_pipeline
    from ..metrics.likelihood import evaluate_likelihood

    finish_report(
        args,
        evaluate_likelihood(
            load_pipeline(args.model),
            model_name(args.model),
            args.data,
            args.split,
            **chosen(args, "label_column", "caption_column"),
        ),
    )


def chosen(args, *more):
    """The options that every evaluation takes by their names, and more, {name: value}."""
    return {name: getattr(args, name) for name in ("image_column", "num_images", "seed", "batch_size", *more)}


def model_name(model):
    """What a report calls a model: the embedded one has another path on every machine."""
    return "embedded" if model == DEFAULT_MODEL else model


def check_report(args):
    """Raise OSError or ValueError now, not after the work, if the report cannot be written."""
    if args.output.suffix != ".json":
        raise ValueError(f"--output must end in .json, got {args.output}")
    check_output(args.output, args.force)
    check_at_least_one(batch_size=args.batch_size)
    check_seed(args.seed)


def finish_report(args, report):
    """Write and print what all processes have measured, once."""
    from accelerate import PartialState

    from ..metrics.references import report_table, write_report

    if PartialState().is_main_process:
        write_report(report, args.output)
        print(report_table(report))
