"""`dq-hf draw`: pictures of what the models do."""

from pathlib import Path

from .images import add_data_options, add_encoding_options, check_encoding, open_image, read_images
from .options import (
    add_command,
    add_force_option,
    add_group,
    add_model_options,
    check_at_least_one,
    check_device,
    check_outputs,
    save_image,
)
from .sampling import add_generation_options, check_generation, chosen_inputs, chosen_sampling

ANIMATIONS = (".gif", ".webp")
MOST_SECONDS = 600  # a GIF shows one frame for 655 seconds at most
FRAME_SECONDS = 0.08
FINISHED_SECONDS = 2  # how long an animation shows the finished images


def register(commands):
    pictures = add_group(commands, "draw", "picture", "Draw pictures of what the models do.")
    order = add_command(pictures, "order", run_order, "Draw an animation of the order in which codes are generated.")
    order.add_argument("output", type=Path, metavar="OUT.gif", help="Write this animation, .gif or .webp.")
    add_generation_options(order, num_images=1)
    order.add_argument(
        "--seconds", type=float, default=8, help="Finish the images after this many seconds (default %(default)s)."
    )
    router = add_command(
        pictures,
        "router",
        run_router,
        "Draw a heat map of what the router decides by, and the coding that follows from it.",
    )
    add_encoding_options(router)
    usage = add_command(pictures, "usage", run_usage, "Draw how often each code is used, as a histogram.")
    usage.add_argument("output", type=Path, metavar="OUT.png", help="Write this picture.")
    add_model_options(usage)
    add_data_options(usage, split="test")
    for picture in (order, router, usage):
        add_force_option(picture)


def run_order(args):
    if not 0 < args.seconds <= MOST_SECONDS:
        raise ValueError(f"--seconds must be above 0 and at most {MOST_SECONDS}, got {args.seconds}")
    if args.output.suffix.lower() not in ANIMATIONS:
        raise ValueError(f"{args.output} must end in {' or '.join(ANIMATIONS)}; other formats hold no animation")
    check_generation(args)
    check_outputs([args.output], args.force)
    device = check_device(args.device)

    import torch
    from PIL import Image
    from tqdm.auto import tqdm

    from ..loading import load_pipeline
    from ..modeling.grain_map_dq import count_codes
    from ..pictures import draw_generation, image_grid

    pipe = load_pipeline(args.model).to(device)
    config = pipe.transformer.config
    inputs = chosen_inputs(args, config, range(args.num_images))
    steps = pipe.transformer.generate_steps(
        inputs["class_labels"],
        args.num_images,
        **pipe.encode_prompt(inputs["prompt"], inputs["negative_prompt"]),
        generator=torch.Generator().manual_seed(args.seed),
        lookahead=args.lookahead,
        **chosen_sampling(args),
    )
    order = 0  # after how many passes each cell has its code
    for state in tqdm(steps, "generate", config.longest_stream - 1, unit="code"):
        order = order + (~state.taken).long()
    codes, grain_maps = state.grids()
    num_frames = max(1, round(args.seconds / FRAME_SECONDS))
    frames = draw_generation(pipe.vae, pipe.image_processor, codes, grain_maps, order.view_as(codes), num_frames)
    if args.output.suffix.lower() == ".gif":  # one palette for all, not dithered: no flicker, a third of the size
        palette = image_grid([frames[0], *frames[-2:]]).quantize()
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    others = len(frames) - 1
    durations = [round(1000 * args.seconds / others)] * others + [1000 * FINISHED_SECONDS]  # milliseconds
    save_image(frames[0], args.output, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    codes = ", ".join(map(str, count_codes(grain_maps).tolist()))
    print(f"{args.output}: {args.num_images} image{'s' if args.num_images > 1 else ''} of {codes} codes")


def run_router(args):
    check_encoding(args)

    import torch

    from ..pictures import draw_scores, import_figure
    from ..training.calibration import LARGEST_SCORE

    import_figure()  # if it cannot be drawn, say so before the work
    vae, processor, pixel_values = open_image(args)
    with torch.no_grad():
        encoded = vae.encode(pixel_values, fine_ratio=args.fine_ratio)
        scores = vae.region_scores(pixel_values)[0].cpu()
    thresholds = vae.router.thresholds.tolist() if args.fine_ratio is None else ()
    # Others have all scores on one side, or are those of a feature router that is not calibrated.
    thresholds = [value for value in thresholds if abs(value) < LARGEST_SCORE]
    image, name = processor.post_process(pixel_values)[0], vae.router.score_name
    save_image(draw_scores(image, scores, name, encoded.grain_map[0].cpu(), thresholds), args.output)
    low, mean, high = (float(value) for value in (scores.min(), scores.mean(), scores.max()))
    print(f"{name}  {low:.3f} ... {high:.3f}, mean {mean:.3f}")
    print(f"codes  {int(encoded.num_codes)}")


def run_usage(args):
    check_outputs([args.output], args.force)
    check_at_least_one(batch_size=args.batch_size)
    device = check_device(args.device)

    import torch
    from tqdm.auto import tqdm

    from ..loading import load_tokenizer
    from ..metrics.code_statistics import CodeStatistics, perplexity
    from ..pictures import draw_code_usage, import_figure

    import_figure()
    vae = load_tokenizer(args.model).to(device)
    images, loader = read_images(args, vae.config)
    statistics = CodeStatistics(vae.config.codebook_size, len(vae.config.granularities))
    for batch in tqdm(loader, desc="encode"):
        with torch.no_grad():
            encoded = vae.encode(batch["pixel_values"].to(device))
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
