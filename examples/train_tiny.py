"""Train a small tokenizer and a small generator of emoji, from the first line to a picture: some six minutes of one CPU core.

    python examples/train_tiny.py --output runs/tiny

Read it from top to bottom: it has all that dynamic vector quantisation needs, and nothing else. Real training (many
processes, checkpoints, discriminator, measurements) is the same two steps in `train_dqvae.py` and `train_dqtransformer.py`.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from tqdm import trange

from dq_hf import (
    DQForImageGeneration,
    DQImageProcessor,
    DQTransformerConfig,
    DQTransformerForImageGeneration,
    DQVAEConfig,
    DQVAEModel,
)
from dq_hf.metrics import psnr
from dq_hf.pictures import draw_grain_map, image_grid

EMOJI = Path(__file__).parent / "data" / "emoji"
CLASSES = ["smileys", "flags"]
BATCH = 16

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--output", type=Path, default=Path("runs/tiny"), help="Folder for the models and tiny.png.")
parser.add_argument("--tokenizer_steps", type=int, default=1000, help="Training steps of DQ-VAE.")
parser.add_argument("--generator_steps", type=int, default=1000, help="Training steps of DQ-Transformer.")
args = parser.parse_args()
torch.manual_seed(0)

# Images as tensors (N, 3, 32, 32) in [-1, 1], and the class of each as a number. Mirror images are more images.
processor = DQImageProcessor(size={"height": 32, "width": 32})


def load(split):
    rows = load_dataset(str(EMOJI), split=split)
    names = rows.features["category"].names
    rows = rows.filter(lambda category: names[category] in CLASSES, input_columns="category")
    labels = torch.tensor([CLASSES.index(names[category]) for category in rows["category"]])
    return processor(list(rows["image"]))["pixel_values"], labels


images, labels = load("train")
images, labels = torch.cat([images, images.flip(-1)]), torch.cat([labels, labels])
test_images, test_labels = load("test")

# Stage 1: the tokenizer. Each region of 8 x 8 pixels gets one code, or four codes of 4 x 4 pixels where the picture needs
# them: where the entropy of its grey values is above a threshold. The median makes half of the regions fine.
config = dict(
    image_size=32,
    granularities=[8, 4],
    block_out_channels=[16, 24, 48, 64],
    layers_per_block=1,
    norm_num_groups=8,
    z_channels=48,
    codebook_size=256,
    codebook_dim=16,
    encoder_attention_factors=[8],
)
with torch.no_grad():
    entropy = DQVAEModel(DQVAEConfig(**config)).eval().encode(images[:512]).entropy
vae = DQVAEModel(DQVAEConfig(**config, entropy_thresholds=[entropy.median().item()]))

optimizer = torch.optim.Adam(vae.parameters(), betas=(0.5, 0.9))
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.tokenizer_steps)
vae.train()
for step in (bar := trange(args.tokenizer_steps, desc="tokenizer")):
    batch = images[torch.randint(len(images), (BATCH,))]
    output = vae(batch)  # the codebook itself moves here: it is a moving average of what is assigned to each code
    output.loss.backward()  # L1 distance + how far features are from their codes
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    if step % 20 == 0:
        bar.set_postfix(l1=f"{output.reconstruction_loss:.3f}", codes=f"{output.num_codes.float().mean():.1f}")
vae.eval()

# Stage 2: the generator learns the codes of the images as sequences, coarse codes first: where each code is (its
# position) and what it is (its content). The tokenizer stays as it is, so that the images are encoded only once.
with torch.no_grad():
    encoded = [vae.encode(batch) for batch in images.split(256)]
codes, grain_maps = (torch.cat([part[name] for part in encoded]) for name in ("codes", "grain_map"))
transformer = DQTransformerForImageGeneration(
    DQTransformerConfig(
        grid_sizes=vae.config.grid_sizes,
        codebook_size=vae.config.codebook_size,
        num_classes=len(CLASSES),
        id2label=dict(enumerate(CLASSES)),
        hidden_size=128,
        num_attention_heads=4,
        num_position_layers=1,
        num_content_layers=3,
    )
)
optimizer = torch.optim.AdamW(transformer.parameters(), betas=(0.9, 0.95))
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.generator_steps)
transformer.train()
for step in (bar := trange(args.generator_steps, desc="generator")):
    rows = torch.randint(len(images), (BATCH,))
    output = transformer(codes[rows], grain_maps[rows], labels[rows])
    output.loss.backward()  # nats an element, of contents and positions
    torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    if step % 20 == 0:
        bar.set_postfix(content=f"{output.content_loss:.2f}", position=f"{output.position_loss:.2f}")

# One model of both, which `DQPipeline.from_pretrained` and `pipeline("dq-generation")` load, and a picture of what it can.
model = DQForImageGeneration.from_models(vae, transformer).eval()
model.save_pretrained(args.output)
shown = torch.cat([(test_labels == label).nonzero()[::6][:6, 0] for label in range(len(CLASSES))])
with torch.no_grad():
    output = vae(test_images[shown])
samples = model.generate(test_labels[shown], top_k=40, generator=torch.Generator().manual_seed(0)).pixel_values
originals, reconstructions, samples = map(processor.post_process, (test_images[shown], output.sample, samples))
maps = [draw_grain_map(image, grain_map, scale=4) for image, grain_map in zip(originals, output.grain_map)]
rows = [[image.resize(maps[0].size) for image in row] for row in (originals, maps, reconstructions, samples)]
image_grid(sum(rows, []), columns=len(shown)).save(args.output / "tiny.png")
quality = psnr(output.sample.clamp(-1, 1), test_images[shown]).mean()
print(f"held-out images: {quality:.1f} dB with {output.num_codes.float().mean():.0f} codes of at most 64")
print(f"{args.output / 'tiny.png'}: originals, grain maps, reconstructions, samples")
