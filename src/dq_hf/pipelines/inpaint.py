"""Editing: masked regions of an image are drawn again, all others are known."""

from dataclasses import dataclass

import torch

from ..modeling.generation_dq import steps_arguments
from ..modeling.grain_map_dq import repeat_cells
from ..modeling.image_processing_dq import flatten_images, from_unit, to_tensor, to_unit
from ..modeling.known_dq import UNKNOWN, as_batch
from ..modeling.modeling_utils_dq import check_indices, evaluation_mode
from ..modeling.sampling_options_dq import argument_names, check_names
from .class_labels import as_list
from .masks import masked_regions, read_masks
from .pipeline_dq import ELSEWHERE, DQPipeline, DQPipelineOutput, bring_to_device, images_each

TEXTS = ("negative_prompt", "prompt_embeds", "prompt_attention_mask")  # conditions that `DQPipeline` has besides
TEXTS += ("negative_prompt_embeds", "negative_prompt_attention_mask")
COUNTS = ("num_images_per_prompt", "num_images_per_label")


@dataclass
class DQInpaintPipelineOutput(DQPipelineOutput):
    """What `DQInpaintPipeline` gives.

    Args:
        images, codes, grain_maps: as in `DQPipelineOutput`.
        regenerated: (B, h, w) bool, the regions that were drawn again: those that the mask touches.
    """

    regenerated: torch.Tensor


class DQInpaintPipeline(DQPipeline):
    """Draws masked regions of images again, given all others, and decodes the whole.

    It has the components of `DQPipeline`, loads the same folders, and `DQInpaintPipeline.from_pipe(pipe)` shares them.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt=None,
        image=None,
        mask_image=None,
        class_labels=None,
        overlay: bool = True,
        grain_map=None,
        output_type: str = "pil",
        return_dict: bool = True,
        **arguments,
    ) -> DQInpaintPipelineOutput:
        """Edit images.

        The codes and the grain map of regions that the mask does not touch are the encoder's, bit for bit. With a mask
        that touches all regions the image is that of `DQPipeline`.

        Args:
            prompt, class_labels: what the image shall show, one or one for each image, as in `DQPipeline`.
            image: an image or a list, of any kind that `DQImageProcessor` takes, which scales and crops it to the model's
                size.
            mask_image: a mask or a list of one for each image, of the image's own size: a PIL image of any mode, or an
                array or tensor (H, W), with a channel or without, of booleans, integers (0 and 1, or 0 ... 255) or floats
                in [0, 1]. White, from one half on, is drawn again, in whole regions.
            overlay: whether pixels outside the regions that are drawn again are the image's own. Along the seam the
                decoder's picture inside is corrected towards them, less and less over half a region. False: the decoder's.
            grain_map: (h, w) or (B, h, w) integers, granularities for regions that are drawn again; -1, or None at all:
                the model decides.
            output_type, return_dict: as in `DQPipeline`; a tuple ends with `regenerated`. With "codes" nothing is decoded.
            arguments: all others of `DQPipeline`, `num_candidates` above all: how many times the regions are drawn, to
                keep what suits the known regions that come later in the stream; and `lookahead`, which gains more here,
                as the guesses of known codes are right.

        Raises:
            TypeError, ValueError: images, masks or other arguments of another type, size or range; a mask that touches
                no region.
        """
        known = (*argument_names(DQPipeline.__call__), *steps_arguments(self.transformer))
        check_names(arguments, known, argument_names(self.__call__), ELSEWHERE | {"codes": "image"})
        self.check_inputs(output_type, ())
        pixel_values, regenerated = self.prepare_images(image, mask_image)
        codes, known_map = self.encode_known(pixel_values, regenerated, grain_map)
        conditions = {name: arguments.pop(name, None) for name in TEXTS}
        conditions |= {"prompt": prompt, "class_labels": class_labels}
        each = images_each(**{name: arguments.pop(name, None) for name in COUNTS})
        if len(pixel_values) > 1:
            conditions = {name: spread(given, len(pixel_values)) for name, given in conditions.items()}
            codes, known_map = (known.repeat_interleave(each, 0) for known in (codes, known_map))
        if all(given is None for given in conditions.values()):
            each *= len(pixel_values)  # images in all
        overlay = overlay and output_type != "codes"
        output = super().__call__(
            codes=codes,
            grain_map=known_map,
            output_type="pt" if overlay else output_type,
            num_images_per_prompt=each,
            **conditions,
            **arguments,
        )
        images, repeats = output.images, len(output.codes) // len(regenerated)
        regenerated = regenerated.repeat_interleave(repeats, 0)
        if overlay:
            originals = to_unit(pixel_values).to(images.device).repeat_interleave(repeats, 0)
            images = from_unit(keep_outside(images, originals, regenerated.to(images.device)), output_type)
        output = DQInpaintPipelineOutput(
            images=images, codes=output.codes, grain_maps=output.grain_maps, regenerated=regenerated
        )
        return output if return_dict else tuple(output.values())

    def prepare_images(self, image, mask_image):
        """Pixel values (B, 3, height, width), and the regions that are to be drawn again, (B, h, w) bool."""
        for name, value in (("image", image), ("mask_image", mask_image)):
            if value is None:
                raise ValueError(f"{name} is missing; editing needs an image and its mask")
        images, masks = [to_tensor(each) for each in flatten_images(image)], read_masks(mask_image)
        if not images or len(masks) not in (1, len(images)):
            raise ValueError(f"mask_image must be one mask or one for each of {len(images)} images, got {len(masks)}")
        config = self.vae.config
        grid = self.transformer.config.grid_sizes[0]
        regenerated = []
        for each, mask in zip(images, masks if len(masks) > 1 else masks * len(images)):
            (height, width), (mask_height, mask_width) = each.shape[1:], mask.shape
            if (height, width) != (mask_height, mask_width):
                raise ValueError(
                    f"mask_image must have the image's size, {width}x{height} pixels; got {mask_width}x{mask_height}"
                )
            regenerated.append(masked_regions(mask, config.image_height_width, grid))
        if empty := [i for i, regions in enumerate(regenerated) if not regions.any()]:
            raise ValueError(
                f"mask_image of image(s) {empty} touches no region of what the model sees; white marks what is drawn again"
            )
        return self.image_processor(images)["pixel_values"], torch.stack(regenerated)

    def encode_known(self, pixel_values, regenerated, grain_map=None):
        """Codes (B, H, W) and grain map (B, h, w) of images, -1 where they are to be drawn."""
        bring_to_device(self.vae)
        with evaluation_mode(self.vae):  # one by one: convolutions of another batch size may round differently
            encoded = [self.vae.encode(each[None].to(self.vae.device)) for each in pixel_values]
        codes, known_map = (torch.cat([getattr(each, name) for each in encoded]) for name in ("codes", "grain_map"))
        regenerated = regenerated.to(codes.device)
        side = codes.shape[1] // known_map.shape[1]
        drawn = known_map.new_tensor(UNKNOWN)
        if grain_map is not None:
            num_granularities = len(self.vae.config.granularities)
            drawn, shape = as_batch("grain_map", grain_map), ("B", *known_map.shape[1:])
            drawn = check_indices("grain_map", drawn, shape, num_granularities, codes.device, UNKNOWN)
            if len(drawn) not in (1, len(known_map)):
                raise ValueError(f"grain_map must be of one image or of each of {len(known_map)}, got {len(drawn)}")
        known_map = torch.where(regenerated, drawn, known_map)
        return codes.masked_fill(repeat_cells(regenerated, side), UNKNOWN), known_map


def spread(conditions, batch):
    """One prompt, label, or states or mask of one text as so many, in a list or a tensor; several as they are."""
    if conditions is None:
        return None
    if isinstance(conditions, torch.Tensor) and conditions.dim() > 1:
        return conditions.expand(batch, *conditions.shape[1:]) if len(conditions) == 1 else conditions
    conditions = as_list(conditions)
    return conditions * batch if len(conditions) == 1 else conditions


def keep_outside(images, originals, regenerated):
    """Images in [0, 1] with the originals' own pixels outside of regions (B, h, w) that were drawn again.

    Along the seam the images differ from the originals by what the decoder cannot draw; this difference, smoothed over a
    region, is added inside, fading out over half a region.
    """
    side = images.shape[2] // regenerated.shape[1]
    inside = repeat_cells(regenerated, side)[:, None]
    outside = (~inside).to(images.dtype)

    def smooth(values):
        return torch.nn.functional.avg_pool2d(values, side // 2 * 2 + 1, stride=1, padding=side // 2)

    share = smooth(outside)  # one half at the seam, 0 from half a region on
    difference = smooth((originals - images) * outside) / share.clamp(min=1e-6)
    return torch.where(inside, (images + difference * (2 * share).clamp(max=1)).clamp(0, 1), originals)
