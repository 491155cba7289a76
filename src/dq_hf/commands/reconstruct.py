"""`dq-hf reconstruct`: an image through the tokenizer and back."""

from .images import add_encoding_options, check_encoding, open_image
from .options import add_command, add_force_option, save_image


def register(commands):
    command = add_command(
        commands, "reconstruct", run, "Encode and decode an image; print its codes, its bits and the PSNR."
    )
    add_encoding_options(command)
    command.add_argument(
        "--show-grain-map",
        action="store_true",
        help="Write the coding, drawn over the image, beside the reconstruction.",
    )
    add_force_option(command)


def run(args):
    check_encoding(args)
    vae, processor, pixel_values = open_image(args)

    import torch

    from ..metrics.code_statistics import count_bits
    from ..metrics.psnr import psnr
    from ..pictures import draw_grain_map, enlarge, image_grid

    with torch.no_grad():
        encoded = vae.encode(pixel_values, fine_ratio=args.fine_ratio)
        decoded = vae.decode_codes(encoded.codes).sample.clamp(-1, 1)
    (result,) = processor.post_process(decoded)
    if args.show_grain_map:
        (original,) = processor.post_process(pixel_values)
        overlay = draw_grain_map(original, encoded.grain_map[0])
        result = image_grid([overlay, enlarge(result, overlay.width // result.width)], columns=2)
    save_image(result, args.output)

    num_codes, num_regions, config = int(encoded.num_codes), encoded.grain_map.numel(), vae.config
    code_bits, map_bits = count_bits(num_codes, num_regions, config.codebook_size, len(config.granularities))
    print(f"codes  {num_codes} ({encoded.codes.numel()} if all regions were fine)")
    print(f"bits   {code_bits + map_bits:.0f} ({code_bits:.0f} codes + {map_bits:.0f} grain map)")
    print(f"PSNR   {psnr(decoded, pixel_values).item():.2f} dB")
