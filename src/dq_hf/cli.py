"""The command `dq-hf`. Results go to stdout, progress to stderr; nothing is overwritten without --force."""

import argparse
import math
import os
import re
import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoConfig

from . import DEFAULT_MODEL, DQConfig, DQImageProcessor, DQPipeline, DQVAEConfig, DQVAEModel
from .codec.cost import reconstruct
from .files import whole_file
from .modeling.grain_map_dq import check_shares, count_codes
from .modeling.hub_dq import loading_from, pin_revision
from .modeling.routing_dq import image_entropy
from .pictures import draw_code_usage, draw_entropy, draw_generation, draw_grain_map, image_grid, import_figure
from .pipelines.class_labels import class_ids
from .pipelines.image_generation import check_seed
from .release import convert_checkpoint

SAMPLING_OPTIONS = (
    "temperature",
    "top_k",
    "top_p",
    "position_temperature",
    "position_top_k",
    "position_top_p",
    "guidance_scale",
)
ANIMATIONS = (".gif", ".webp")
FRAME_SECONDS = 0.08
FINISHED_SECONDS = 2  # how long an animation shows the finished images


def main(arguments=None):
    """Run one command; an expected failure ends with exit status 1 and one line on stderr."""
    args = make_parser().parse_args(arguments)
    try:
        args.run(args)
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"dq-hf {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def make_parser():
    """Commands and their options."""
    parser = argparse.ArgumentParser(prog="dq-hf", description="Dynamic vector quantisation of images.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    generate = add_command(commands, "generate", run_generate, "sample images")
    add_generation_options(generate, num_images=16)
    generate.add_argument("--batch-size", type=int, default=16, help="images at a time; changes the speed only")
    generate.add_argument("--show-grain-map", action="store_true", help="the variable-length coding beside each image")
    where = generate.add_mutually_exclusive_group(required=True)
    where.add_argument("--output", type=Path, metavar="GRID.png", help="one picture with all images")
    where.add_argument("--output-dir", type=Path, metavar="DIR", help="a file for each image")
    generate.add_argument("--force", action="store_true", help="overwrite")

    reconstruct = add_command(commands, "reconstruct", run_reconstruct, "encode and decode an image")
    add_encoding_options(reconstruct)
    reconstruct.add_argument(
        "--show-grain-map", action="store_true", help="write the coding, drawn over the image, and the reconstruction"
    )
    reconstruct.add_argument("--force", action="store_true", help="overwrite")

    convert = add_command(commands, "convert", run_convert, "convert a checkpoint of the paper's release")
    convert.add_argument(
        "--config", type=Path, required=True, metavar="CONFIG.yml", help="the release's configuration"
    )
    convert.add_argument("--checkpoint", type=Path, required=True, metavar="MODEL.ckpt", help="the release's weights")
    convert.add_argument("--output", type=Path, required=True, metavar="DIR", help="new or empty folder")
    convert.add_argument(
        "--thresholds",
        type=Path,
        metavar="FILE.json",
        help="table of entropy thresholds; default: the one that the configuration names, beside it or in a folder above",
    )
    convert.add_argument("--force", action="store_true", help="write into a folder that has files")

    calibrate = add_command(commands, "calibrate", run_calibrate, "fit a router's thresholds to images")
    add_data_options(calibrate, split="train")
    calibrate.add_argument("--model", required=True, metavar="DIR", help="local folder whose weights are changed")
    calibrate.add_argument(
        "--fine-ratio",
        type=float,
        nargs="+",
        default=[0.5],
        help="share of regions at each granularity but the coarsest",
    )

    add_evaluate_commands(commands)

    draw = commands.add_parser("draw", help="pictures of what the models do", description="Pictures of the models.")
    pictures = draw.add_subparsers(dest="picture", required=True, metavar="picture")
    order = add_command(pictures, "order", run_draw_order, "an animation of the order in which codes are generated")
    order.add_argument("output", type=Path, metavar="OUT.gif")
    add_generation_options(order, num_images=1)
    order.add_argument("--seconds", type=float, default=8, help="until the images are finished (default 8)")
    entropy = add_command(pictures, "entropy", run_draw_entropy, "a heat map of an image's entropy, and its coding")
    add_encoding_options(entropy)
    usage = add_command(pictures, "usage", run_draw_usage, "how often each code is used, as a histogram")
    usage.add_argument("output", type=Path, metavar="OUT.png")
    add_model_options(usage)
    add_data_options(usage, split="test")
    for picture in (order, entropy, usage):
        picture.add_argument("--force", action="store_true", help="overwrite")

    demo = add_command(commands, "demo", run_demo, "serve a page to sample and to reconstruct images on")
    add_model_options(demo)
    demo.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: reachable from outside")
    demo.add_argument("--port", type=int, default=7860, help="0: any free one (default 7860)")
    return parser


def add_evaluate_commands(commands):
    """`evaluate reconstruction` and `evaluate generation`."""
    evaluate = commands.add_parser("evaluate", help="measure a model", description="Measure a model.")
    kinds = evaluate.add_subparsers(dest="kind", required=True, metavar="kind")
    reconstruction = add_command(
        kinds, "reconstruction", run_evaluate_reconstruction, "what encoding and decoding images loses and takes"
    )
    generation = add_command(
        kinds,
        "generation",
        run_evaluate_generation,
        "how samples compare with real images; with `accelerate launch -m dq_hf evaluate generation` in many processes",
    )
    for command in (reconstruction, generation):
        command.add_argument(
            "--model", default=DEFAULT_MODEL, help="folder or Hub id; default: the embedded emoji model"
        )
        command.add_argument("--data", required=True, help="real images: a folder of images or Parquet, or a Hub id")
        command.add_argument("--split", default="test")
        command.add_argument("--image-column", default="image")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--batch-size", type=int, default=32, help="images at a time")
        command.add_argument(
            "--extractor",
            default="auto",
            help="of features: inception-v3, efficientnet-lite0, or auto: the first whose weights are to be had",
        )
        command.add_argument("--output", type=Path, required=True, metavar="REPORT.json")
        command.add_argument("--force", action="store_true", help="overwrite the report")
    reconstruction.add_argument("-n", "--num-images", type=int, help="drawn by the seed; default: all")
    reconstruction.add_argument(
        "--perceptual",
        default="auto",
        help="lpips, efficientnet-lite0, or auto: the first whose weights are to be had",
    )
    reconstruction.add_argument("--fine-ratio", type=float, nargs="+", help="as in `dq-hf reconstruct`")
    generation.add_argument("-n", "--num-images", type=int, help="samples; default: as many as real images")
    generation.add_argument("--num-references", type=int, help="real images, drawn by the seed; default: all")
    generation.add_argument(
        "--image-dir", type=Path, metavar="DIR", help="the samples, to go on from; default: beside the report"
    )
    generation.add_argument(
        "--class-labels",
        choices=("reference", "balanced"),
        default="reference",
        help="those of the real images, in a mixed order, or every class in turn",
    )
    generation.add_argument("--label-column", default="label")
    add_sampling_options(generation)


def add_command(commands, name, run, description):
    """A sub-command whose function is `run(args)`."""
    command = commands.add_parser(name, help=description, description=description.capitalize() + ".")
    command.set_defaults(run=run)
    return command


def add_generation_options(command, num_images):
    """Which model, which images of it, and how they are drawn."""
    add_model_options(command)
    command.add_argument(
        "--class-label", nargs="+", metavar="CLASS", help="names or ids, in turn; default: every class"
    )
    command.add_argument("-n", "--num-images", type=int, default=num_images, help="images in all (%(default)s)")
    command.add_argument("--seed", type=int, default=0)
    add_sampling_options(command)


def add_encoding_options(command):
    """Which image goes where, and how it is encoded."""
    command.add_argument("input", type=Path, metavar="IN.png")
    command.add_argument("output", type=Path, metavar="OUT.png")
    add_model_options(command)
    command.add_argument(
        "--fine-ratio",
        type=float,
        nargs="+",
        help="share of regions coded finely, 0 ... 1; default: the router's choice",
    )
    command.add_argument("--resize", action="store_true", help="scale and crop to the model's image size")


def add_data_options(command, split):
    """Which images of a data set."""
    command.add_argument("--data", required=True, help="folder of images or Parquet, or a data set of the Hub")
    command.add_argument("--split", default=split, help="(default %(default)s)")
    command.add_argument("--image-column", default="image")
    command.add_argument("--streaming", action="store_true", help="read a data set that does not fit on the disk")
    command.add_argument(
        "--max-broken-share",
        type=float,
        default=0.01,
        help="images that cannot be read are skipped and named; above this share it is an error (default 0.01)",
    )
    command.add_argument("--batch-size", type=int, default=32)


def add_model_options(command):
    """Which model, and on which device."""
    command.add_argument("--model", default=DEFAULT_MODEL, help="folder or Hub id; default: the embedded emoji model")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def add_sampling_options(command):
    """How codes and positions are drawn."""
    sampling = command.add_argument_group("sampling", "of codes and, with --position-..., of where they go")
    for name in SAMPLING_OPTIONS:
        kind = int if name.endswith("top_k") else float
        sampling.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help="default: the model's")
    sampling.add_argument("--fine-positions", choices=("fixed", "free"), default="fixed")


def run_generate(args):
    """`dq-hf generate`."""
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    check_sampling(args)
    if args.output is not None:
        paths = [args.output]
    else:
        paths = [args.output_dir / f"{i:05d}.png" for i in range(args.num_images)]
    check_outputs(paths, args.force, make_folder=args.output_dir is not None)

    pipe = DQPipeline.from_pretrained(find_model(args.model)).to(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    images = []
    for first in range(0, args.num_images, args.batch_size):
        output = sample(pipe, args, range(first, min(first + args.batch_size, args.num_images)), generator)
        pictures = output.images
        if args.show_grain_map:
            scale = math.ceil(8 / pipe.vae.config.granularities[-1])  # frames of at least 8 pixels, one size for all
            pictures = [beside_grain_map(*pair, scale) for pair in zip(output.images, output.grain_maps)]
        if args.output_dir is not None:
            args.output_dir.mkdir(parents=True, exist_ok=True)
            for image, path in zip(pictures, paths[first:]):
                save_image(image, path)
        images += pictures
    if args.output is not None:
        save_image(image_grid(images), args.output)
    print(args.output or f"{args.output_dir}: {args.num_images} images")


def check_sampling(args):
    """Raise ValueError if the number of images, the seed or the device cannot be."""
    if args.num_images < 1:
        raise ValueError(f"--num-images must be at least 1, got {args.num_images}")
    check_seed(args.seed)
    check_device(args.device)


def sample(pipe, args, numbers, generator, **options):
    """The pipeline's output for the images of these numbers, whose classes come in turn."""
    pipe.set_progress_bar_config(desc="generate", unit="code")
    config = pipe.transformer.config
    which = {"num_images_per_label": len(numbers)}
    if args.class_label is not None or config.num_classes:
        names = args.class_label or list(range(config.num_classes))
        ids = class_ids(
            [int(name) if isinstance(name, str) and is_id(name, config) else name for name in names], config
        )
        which = {"class_labels": [ids[number % len(ids)] for number in numbers]}
    sampling = {name: getattr(args, name) for name in (*SAMPLING_OPTIONS, "fine_positions")}
    return pipe(**which, **sampling, generator=generator, **options)


def is_id(name, config):
    """Whether a class given on the command line is a number, and not a name."""
    return name not in config.label2id and re.fullmatch("-?[0-9]+", name) is not None


def run_reconstruct(args):
    """`dq-hf reconstruct`."""
    vae, processor, pixel_values = open_image(args)
    reconstruction = reconstruct(vae, pixel_values, single(args.fine_ratio))
    result = processor.post_process(reconstruction.pixel_values)[0]
    if args.show_grain_map:
        original = processor.post_process(pixel_values)[0]
        overlay = draw_grain_map(original, reconstruction.grain_map)
        result = image_grid([overlay, result.resize(overlay.size, Image.NEAREST)], columns=2)
    save_image(result, args.output)

    cost = reconstruction.cost
    print(f"codes  {cost.num_codes} ({reconstruction.codes.numel()} if all regions were fine)")
    print(f"bits   {cost.bits:.0f} ({cost.code_bits:.0f} codes + {cost.map_bits:.0f} grain map)")
    print(f"PSNR   {reconstruction.psnr:.2f} dB")


def open_image(args):
    """The tokenizer, its processor, and the image as `pixel_values`; for `add_encoding_options`."""
    check_device(args.device)
    check_outputs([args.output], args.force)
    image = read_image(args.input)
    vae = load_vae(args.model).to(args.device)
    height, width = vae.config.image_height_width
    processor = DQImageProcessor(size={"height": height, "width": width}, do_resize=args.resize)
    pixel_values = processor(image)["pixel_values"].to(args.device)
    factor = vae.config.granularities[0]
    if any(side % factor for side in pixel_values.shape[2:]):
        found_height, found_width = pixel_values.shape[2:]
        raise ValueError(
            f"image sides must be multiples of {factor}, got {found_width}x{found_height}; "
            f"give --resize for {width}x{height}, or resize the file"
        )
    return vae, processor, pixel_values


def load_vae(model):
    """The tokenizer of a folder or repository, which may hold both models."""
    return DQVAEModel.from_pretrained(model, subfolder="vae" if holds_both(model) else "")


def holds_both(model):
    """Whether a folder or repository holds a generator beside the tokenizer."""
    with loading_from(model):
        return isinstance(AutoConfig.from_pretrained(model, revision=pin_revision(model)), DQConfig)


def run_convert(args):
    """`dq-hf convert`."""
    model = convert_checkpoint(args.config, args.checkpoint, args.output, args.force, args.thresholds, report=print)
    print(f"{args.output}: {type(model).__name__}, {model.num_parameters():,} parameters")


def run_calibrate(args):
    """`dq-hf calibrate`."""
    from .training.calibration import calibrate, save_thresholds

    folder = Path(args.model)
    if not (folder / "config.json").is_file():
        raise OSError(f"--model must be a local folder with a config.json, got {folder}; download the model first")
    config = AutoConfig.from_pretrained(folder)
    vae_config = config.vae_config if isinstance(config, DQConfig) else config
    if not isinstance(vae_config, DQVAEConfig) or len(vae_config.granularities) == 1:
        raise ValueError(f"{folder} must hold a DQ-VAE with a router that chooses; no other has thresholds")
    shares = check_shares("--fine-ratio", args.fine_ratio, len(vae_config.granularities))
    vae = DQVAEModel.from_pretrained(folder if vae_config is config else folder / "vae")
    images, loader = read_images(args, vae_config)
    achieved = calibrate(vae, (batch["pixel_values"] for batch in loader), shares)
    save_thresholds(folder, vae.router.thresholds)
    unit = " nats" * (vae_config.router == "entropy")
    print(f"thresholds  {' '.join(f'{value:.7f}' for value in vae.router.thresholds)}{unit}")
    num_images = images.num_rows - images.num_broken
    print(f"achieved    {' '.join(f'{share:.4f}' for share in achieved)} of the regions of {num_images} images")


def read_images(args, vae_config):
    """The images of `add_data_options`, with counts of those read, and a loader of their `pixel_values`."""
    from .data.images import ImageCollator, load_images
    from .data.streams import StreamedImages

    height, width = vae_config.image_height_width
    collate = ImageCollator(DQImageProcessor(size={"height": height, "width": width}), args.image_column)
    dataset = load_images(args.data, args.split, args.image_column, args.streaming)
    if not args.streaming:
        dataset = dataset.to_iterable_dataset()
    images = StreamedImages(dataset, args.image_column, args.max_broken_share, shuffle_buffer=0)
    return images, torch.utils.data.DataLoader(images, args.batch_size, collate_fn=collate)


def run_evaluate_reconstruction(args):
    """`dq-hf evaluate reconstruction`."""
    check_report(args)
    from .metrics.reconstruction import evaluate_reconstruction

    finish_report(
        args,
        evaluate_reconstruction(
            load_vae(args.model),
            model_name(args.model),
            args.data,
            args.split,
            image_column=args.image_column,
            num_images=args.num_images,
            seed=args.seed,
            batch_size=args.batch_size,
            fine_ratio=single(args.fine_ratio),
            networks={"extractor": args.extractor, "perceptual": args.perceptual},
        ),
    )


def run_evaluate_generation(args):
    """`dq-hf evaluate generation`."""
    check_report(args)
    from .metrics.generation import evaluate_generation

    options = {name: getattr(args, name) for name in SAMPLING_OPTIONS if getattr(args, name) is not None}
    finish_report(
        args,
        evaluate_generation(
            DQPipeline.from_pretrained(find_model(args.model)),
            model_name(args.model),
            args.data,
            args.split,
            args.image_dir or args.output.with_suffix(""),
            image_column=args.image_column,
            num_images=args.num_images,
            num_references=args.num_references,
            seed=args.seed,
            batch_size=args.batch_size,
            label_rule=args.class_labels,
            label_column=args.label_column,
            sampling=options | {"fine_positions": args.fine_positions},
            networks={"extractor": args.extractor},
        ),
    )


def model_name(model):
    """What a report calls a model: the embedded one has another path on every machine."""
    return "embedded" if model == DEFAULT_MODEL else model


def check_report(args):
    """Raise OSError or ValueError now, not after the work, if the report cannot be written."""
    if args.output.suffix != ".json":
        raise ValueError(f"--output must end in .json, got {args.output}")
    if args.output.exists() and not args.force:
        raise OSError(f"{args.output} exists; choose another name or give --force")
    if args.output.is_dir() or not args.output.parent.is_dir() or not os.access(args.output.parent, os.W_OK):
        raise OSError(f"{args.output} cannot be written; its folder must exist and be writable")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")
    check_seed(args.seed)


def finish_report(args, report):
    """Write and print what all processes have measured, once."""
    from accelerate import PartialState

    from .metrics.references import report_table, write_report

    if PartialState().is_main_process:
        write_report(report, args.output)
        print(report_table(report))


def run_draw_order(args):
    """`dq-hf draw order`."""
    if not 0 < args.seconds < math.inf:
        raise ValueError(f"--seconds must be above 0, got {args.seconds}")
    if args.output.suffix.lower() not in ANIMATIONS:
        raise ValueError(f"{args.output} must end in {' or '.join(ANIMATIONS)}; other formats hold no animation")
    check_sampling(args)
    check_outputs([args.output], args.force)
    pipe = DQPipeline.from_pretrained(find_model(args.model)).to(args.device)
    order = 0  # after how many steps each cell has its code

    def on_step_end(pipe, step, _, tensors):
        nonlocal order
        order = order + (~tensors["taken"]).long()

    output = sample(
        pipe,
        args,
        range(args.num_images),
        torch.Generator().manual_seed(args.seed),
        output_type="codes",
        callback_on_step_end=on_step_end,
        callback_on_step_end_tensor_inputs=("taken",),
    )
    num_frames = max(1, round(args.seconds / FRAME_SECONDS))
    frames = draw_generation(
        pipe.vae, pipe.image_processor, output.codes, output.grain_maps, order.view_as(output.codes), num_frames
    )
    if args.output.suffix.lower() == ".gif":  # one palette for all, not dithered: no flicker, a third of the size
        palette = image_grid([frames[0], *frames[-2:]]).quantize()
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    seconds = [args.seconds / (len(frames) - 1)] * (len(frames) - 1) + [FINISHED_SECONDS]
    durations = [round(1000 * value) for value in seconds]
    save_image(frames[0], args.output, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    codes = count_codes(output.grain_maps).tolist()
    print(f"{args.output}: {args.num_images} images of {', '.join(map(str, codes))} codes")


def run_draw_entropy(args):
    """`dq-hf draw entropy`."""
    import_figure()
    vae, processor, pixel_values = open_image(args)
    with torch.no_grad():
        encoded = vae.encode(pixel_values, fine_ratio=single(args.fine_ratio))
    entropy = image_entropy(pixel_values, vae.config.granularities[0])[0].cpu()
    by_entropy = vae.config.router == "entropy" and args.fine_ratio is None
    thresholds = vae.router.thresholds.tolist() if by_entropy else ()
    image = processor.post_process(pixel_values)[0]
    save_image(draw_entropy(image, entropy, encoded.grain_map[0].cpu(), thresholds), args.output)
    low, mean, high = (float(value) for value in (entropy.min(), entropy.mean(), entropy.max()))
    print(f"entropy  {low:.3f} ... {high:.3f} nats a region, mean {mean:.3f}")
    print(f"codes    {int(encoded.num_codes)}")


def run_draw_usage(args):
    """`dq-hf draw usage`."""
    from .metrics.code_statistics import CodeStatistics, perplexity

    import_figure()  # if it cannot be drawn, say so before the work
    check_device(args.device)
    check_outputs([args.output], args.force)
    vae = load_vae(args.model).to(args.device)
    images, loader = read_images(args, vae.config)
    statistics = CodeStatistics(vae.config.codebook_size, len(vae.config.granularities))
    for batch in tqdm(loader, desc="encode"):
        with torch.no_grad():
            encoded = vae.encode(batch["pixel_values"].to(args.device))
        statistics.add_batch(codes=encoded.codes, grain_maps=encoded.grain_map)
    uses = statistics.state["uses"]
    if not uses.any():
        raise ValueError(f"{args.data} must hold at least one image, got none")
    save_image(draw_code_usage(uses, vae.config.granularities), args.output)
    print(f"images     {images.num_rows - images.num_broken}")
    rows = {f"{side}x{side}": row for side, row in zip(vae.config.granularities, uses)}
    for name, row in (rows | {"all": uses.sum(0)}).items():
        print(f"{name:10} {int((row > 0).sum())} of {len(row)} codes, used {int(row.sum())} times", end="")
        print(f", perplexity {perplexity(row):.1f}" if row.any() else "")


def single(shares):
    """One share as a number, more as the list, None as None."""
    return shares[0] if shares is not None and len(shares) == 1 else shares


def run_demo(args):
    """`dq-hf demo`."""
    check_device(args.device)
    from .demo import serve

    serve(args.model, args.device, args.host, args.port)


def beside_grain_map(image, grain_map, scale):
    """The image, and beside it the coding drawn over it, both enlarged."""
    overlay = draw_grain_map(image, grain_map, scale)
    return image_grid([image.resize(overlay.size, Image.NEAREST), overlay], columns=2)


def find_model(model):
    """The local folder of tokenizer and generator; a repository of the Hub is fetched."""
    return Path(model if Path(model).is_dir() else DQPipeline.download(model))


def read_image(path):
    """The image in a file, whole, or OSError."""
    try:
        with Image.open(path) as file:
            return file.copy()
    except FileNotFoundError:
        raise OSError(f"{path} does not exist") from None
    except Exception as error:  # Pillow's decoders raise almost any kind on damaged data
        raise OSError(
            f"{path} is damaged, or no image that Pillow can read: {type(error).__name__}: {error}"
        ) from error


def check_device(device):
    """Raise ValueError if there is no such device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch without CUDA
        raise ValueError(f"--device {device} cannot be used: {error}") from error


def check_outputs(paths, force, make_folder=False):
    """Raise OSError or ValueError now, not after the work, if images cannot be written to `paths`, of one folder.

    Args:
        make_folder: the folder need not exist; it is made later.
    """
    suffix, folder = paths[0].suffix.lower(), paths[0].parent
    if Image.registered_extensions().get(suffix) not in Image.SAVE:
        raise ValueError(f"{paths[0]} must end like an image file, for example .png")
    for path in paths:
        if path.exists() and not force:
            raise OSError(f"{path} exists; choose another name or give --force")
    while make_folder and not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if any(path.is_dir() for path in paths) or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OSError(f"{paths[0]} cannot be written; its folder must exist and be writable")


def save_image(image, path, **options):
    """Write through a temporary file, so that what was there is lost only once the new image is whole."""
    with whole_file(path) as partial:
        image.save(partial, **options)


if __name__ == "__main__":
    main()
