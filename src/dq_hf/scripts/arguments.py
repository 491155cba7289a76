"""Options of the three scripts, their ranges and how they belong together; read before torch is imported."""

from dataclasses import MISSING, dataclass
from typing import Literal

from dq_hf import DEFAULT_MODEL
from dq_hf.training.options import (
    SMALL,
    ImageOptions,
    RunOptions,
    option,
    require,
    require_different,
    require_probability,
    require_share,
    size_option,
)

TOKENIZER_SIZES = {  # of a new model
    "image_size": 64,
    "granularities": [8, 4],
    "router": "entropy",
    "fine_ratios": [0.5],
    "block_out_channels": [32, 48, 96, 128],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "z_channels": 96,
    "codebook_size": 512,
    "codebook_dim": 32,
}

GENERATOR_SIZES = {  # of a new model
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_position_layers": 2,
    "num_content_layers": 4,
    "fine_order": "row-first",
    "class_dropout": 0.1,
    "text_length": 16,
    "text_dropout": 0.1,
}


@dataclass(kw_only=True)
class TokenizerArguments(RunOptions):
    """Options of `RunOptions`, and those of the tokenizer and its objective."""

    start_from: str | None = option(
        None,
        "Folder or Hub id of a DQVAEModel to go on from; its sizes stay, and its thresholds unless the router is a feature "
        "router.",
    )
    decoder_only: bool = option(
        False, "With --start_from: train the decoder alone, so that all codes, caches and generators stay valid."
    )
    image_size: list[int] | None = size_option(
        TOKENIZER_SIZES["image_size"], "Sides of the images in pixels: one number, or height and width, like 64 96."
    )
    granularities: list[int] | None = size_option(
        TOKENIZER_SIZES["granularities"],
        "Sides in pixels of what a code stands for, coarsest first, each half of the one before.",
    )
    router: Literal["entropy", "feature", "gain", "random"] | None = size_option(
        TOKENIZER_SIZES["router"],
        "What chooses the granularity of a region: its entropy, a network that sees its features (feature, or gain with --start_from), or chance.",
    )
    fine_ratios: list[float] | None = size_option(
        TOKENIZER_SIZES["fine_ratios"], "Budget: share of the regions at each granularity but the coarsest."
    )
    calibration_images: int = option(4096, "Training images on which the router is set to its budget.")
    block_out_channels: list[int] | None = size_option(
        TOKENIZER_SIZES["block_out_channels"],
        "Widths of the encoder, one for each halving down to the coarsest granularity.",
    )
    layers_per_block: int | None = size_option(TOKENIZER_SIZES["layers_per_block"], "Residual blocks of each width.")
    norm_num_groups: int | None = size_option(TOKENIZER_SIZES["norm_num_groups"], "Groups of the group norms.")
    z_channels: int | None = size_option(TOKENIZER_SIZES["z_channels"], "Width of the features that are quantised.")
    codebook_size: int | None = size_option(TOKENIZER_SIZES["codebook_size"], "Number of codes.")
    codebook_dim: int | None = size_option(TOKENIZER_SIZES["codebook_dim"], "Width of a code's vector.")

    perceptual: Literal["lpips", "efficientnet-lite0"] = option(
        "efficientnet-lite0", "Perceptual loss: lpips (the paper's), or efficientnet-lite0 (offline and fast)."
    )
    perceptual_weight: float = option(0.2, "Weight of the perceptual loss; 0 needs no feature network.")
    disc_weight: float = option(0.75, "Weight of the adversarial loss; 0 means no discriminator.")
    disc_start: int = option(2000, "Step at which the discriminator begins.")
    disc_ramp: int = option(0, "Steps in which the adversarial loss comes to its full weight; 0 means at once.")
    disc_channels: int = option(64, "Width of the discriminator's first layer.")
    disc_layers: int = option(
        3,
        "Layers of the discriminator that halve the image. It judges patches of 16, 34, 70 or 142 pixels a side with 1, 2, "
        "3 or 4 layers (Isola et al. 2017).",
    )
    disc_norm: Literal["batch", "group", "none"] = option(
        "batch",
        "Norm of the discriminator: batch (the paper's); group, of each image alone (Wu and He 2018); none.",
    )
    disc_r1: float = option(
        0.0,
        "Gamma of the R1 penalty, gamma / 2 times the squared gradient of the discriminator at real images (Mescheder et "
        "al. 2018); not with --disc_norm batch, where it would depend on other images. 0 means none.",
    )
    disc_lecam: float = option(
        0.0,
        "Weight of the LeCam regularisation, which draws the discriminator's logits of real and of reconstructed images to "
        "each other's moving averages (Tseng et al. 2021), for small data sets. 0 means none.",
    )

    gradient_accumulation_steps: int = option(
        1, "Forward passes of a step; the codebook still moves at every one of them."
    )
    learning_rate: float = option(
        6e-4, "Highest learning rate, far above the paper's 4.5e-6 times the batch size: for short runs."
    )
    ema_decay: float = option(0.999, "Decay of the moving average of the weights, which is kept; 0 means none.")

    def __post_init__(self):
        super().__post_init__()
        require(self, 1, "calibration_images", "disc_channels", "disc_layers")
        require(self, 0, "perceptual_weight", "disc_weight", "disc_start", "disc_ramp", "disc_r1", "disc_lecam")
        require_share(self, "ema_decay")
        if self.disc_r1 > 0 and self.disc_norm == "batch":
            raise ValueError(
                f"--disc_r1 {self.disc_r1} needs a discriminator that judges each image by itself: --disc_norm group or none"
            )
        if self.image_size is not None and self.image_size[1:] in ([], self.image_size[:1]):
            self.image_size = self.image_size[0]  # of a square, as in the model's configuration
        if self.decoder_only and self.start_from is None:
            raise ValueError("--decoder_only trains the decoder of a finished model; give it with --start_from")
        if self.router == "gain" and self.start_from is None:
            raise ValueError(
                "--router gain is learned from a trained tokenizer: train with --router entropy, then run dq-hf train-router"
            )


@dataclass(kw_only=True)
class EncodeArguments(ImageOptions):
    """Options of `ImageOptions`, and those of the code cache."""

    output_dir: str = option(MISSING, "Folder of the code cache.")
    vae: str = option(
        f"{DEFAULT_MODEL}/vae", "Tokenizer: folder or Hub id of a DQVAEModel, or of both models together."
    )
    test_split: list[str] = option(
        ["test"], "Held-out splits, as many as there are; none means that only the training split is encoded."
    )
    label_column: str | None = option(
        None, "Column with the class labels; none means codes without classes. Default: label, if there are labels."
    )
    caption_column: str | None = option(
        None, "Column with the captions, one or several an image, for a generator with text. Default: no captions."
    )
    max_uncaptioned_share: float = option(
        0.01, "Images without a caption count as images of no text; it is an error if their share is larger than this."
    )
    max_images: int | None = option(None, "Encode at most this many images of each split. Default: all.")

    horizontal_flips: bool = option(True, "Encode the mirror images of the training split, too.")
    copies: int = option(
        1,
        "Versions of each training image: itself, and others that are cropped (--crop random) or shifted (--max_shift) at "
        "random; each with its mirror image.",
    )
    max_shift: int = option(0, "Pixels by which the further versions are shifted at most, along each axis.")
    overwrite: bool = option(False, "Replace the code cache in --output_dir.")

    def __post_init__(self):
        super().__post_init__()
        require(self, 1, "max_images", "copies")
        require(self, 0, "max_shift")
        require_share(self, "max_uncaptioned_share")
        self.caption_column = None if self.caption_column == "none" else self.caption_column
        self.test_split = [] if self.test_split == ["none"] else self.test_split
        require_different(self, "test_split")
        if self.train_split in self.test_split:
            raise ValueError(f"--test_split must not have the training split, got {' '.join(self.test_split)}")
        if (self.copies > 1) != (self.max_shift > 0 or self.crop == "random"):
            raise ValueError(
                "--copies above 1 needs --crop random or --max_shift above 0, and the other way round; got "
                f"--copies {self.copies}, --crop {self.crop} and --max_shift {self.max_shift}"
            )


@dataclass(kw_only=True)
class GeneratorArguments(RunOptions):
    """Options of `RunOptions`, and those of the generator."""

    vae: str = option(
        f"{DEFAULT_MODEL}/vae", "Tokenizer: folder or Hub id of a DQVAEModel, or of both models together."
    )
    codes: str | None = option(
        None, "Code cache, made by encode_dataset.py; without one, the images are encoded at every step."
    )
    label_column: str | None = option(
        None, "Column with the class labels; none means a model without classes. Default: label, if there are labels."
    )
    caption_column: str | None = option(
        None,
        "Column with the captions, one or several an image, of which one is drawn each time the image is seen; with "
        "--codes those of the cache, whatever the name. Default: a model without text.",
    )
    max_uncaptioned_share: float = option(
        0.01, "Images without a caption count as images of no text; it is an error if their share is larger than this."
    )
    length_buckets: bool = option(True, "With --codes: make batches of streams of similar length.")

    start_from: str | None = option(
        None,
        "Folder or Hub id of a generator, alone or with its tokenizer, to go on from; its sizes stay. Its text "
        "encoder goes on with --text_encoder, the same folder, and --train_text_encoder.",
    )
    hidden_size: int | None = size_option(GENERATOR_SIZES["hidden_size"], "Width of both transformers.")
    num_attention_heads: int | None = size_option(
        GENERATOR_SIZES["num_attention_heads"], "Attention heads of each layer."
    )
    num_position_layers: int | None = size_option(
        GENERATOR_SIZES["num_position_layers"], "Layers of the Position-Transformer."
    )
    num_content_layers: int | None = size_option(
        GENERATOR_SIZES["num_content_layers"], "Layers of the Content-Transformer."
    )
    fine_order: Literal["row-first", "region-first"] | None = size_option(
        GENERATOR_SIZES["fine_order"], "Order of the codes of a granularity: row-first, or region-first."
    )
    class_dropout: float | None = size_option(
        GENERATOR_SIZES["class_dropout"],
        "Share of the images whose class is hidden, for classifier-free guidance; 0 means none.",
    )
    text_encoder: str | None = option(
        None,
        "What reads the captions: small, two layers and a vocabulary of whole words that are made from the captions and "
        "trained along; or the folder or Hub id of any text encoder of transformers, which stays as it is. Default: small, "
        "but with --start_from there is none.",
    )
    train_text_encoder: bool = option(False, "Train the --text_encoder of a folder or of the Hub along, too.")
    precompute_text: bool = option(
        False, "Compute the states of each caption once, at the start, and keep them in memory, if they are to stay."
    )
    text_length: int | None = size_option(GENERATOR_SIZES["text_length"], "Tokens of a caption; longer ones are cut.")
    text_dropout: float | None = size_option(
        GENERATOR_SIZES["text_dropout"],
        "Share of the images whose caption is hidden, for classifier-free guidance; 0 means none.",
    )
    dropout: float = option(0.1, "Dropout of embeddings and residuals.")
    attention_dropout: float = option(0.1, "Dropout of attention; 0 lets the fast kernels work on a CPU.")
    attn_implementation: str | None = option(
        None, "Attention of transformers, such as eager, sdpa, flash_attention_2. Default: what transformers chooses."
    )

    horizontal_flips: bool = option(
        True, "Mirror half of the training images; with --codes the cache has its mirror images, or not."
    )
    weight_decay: float = option(0.01, "Weight decay, on the weights of linear layers only.")
    warmup_steps: int = option(200, "Steps in which the learning rate rises to its highest.")
    ema_decay: float = option(
        0.0, "Decay of the moving average of the weights, which is then measured and kept; 0 means none."
    )

    def __post_init__(self):
        super().__post_init__()
        require(self, 1, "hidden_size", "num_attention_heads", "num_position_layers", "num_content_layers")
        require(self, 1, "text_length")
        require(self, 0, "weight_decay")
        require_probability(self, "class_dropout", "text_dropout", "dropout", "attention_dropout")
        require_share(self, "ema_decay", "max_uncaptioned_share")
        self.caption_column = None if self.caption_column == "none" else self.caption_column
        if self.codes is not None:
            if self.streaming:
                raise ValueError(
                    "--streaming reads images as they come, but --codes has their codes; leave one of them out"
                )
            if self.crop == "random" or self.no_flip_column is not None:
                raise ValueError(
                    "--crop and --no_flip_column are of images, but --codes has their codes; give them to dq-hf encode"
                )
            # Its columns have names of their own.
            self.label_column = self.label_column if self.label_column in (None, "none") else "label"
            self.caption_column = self.caption_column and "captions"
        self.settle_text()

    def settle_text(self):
        """Check the options of the text side, and choose those that were left out."""
        if self.caption_column is None:
            for name in ("text_encoder", "text_length", "text_dropout", "train_text_encoder", "precompute_text"):
                if getattr(self, name) not in (None, False):
                    raise ValueError(f"--{name} is for a model with text; give it with --caption_column")
            return
        if self.start_from is not None and self.text_encoder is None:
            raise ValueError(
                f"--start_from {self.start_from} goes on with the text encoder that it learned from: give --text_encoder "
                f"{self.start_from} if that is its own, with --train_text_encoder if it is to learn too, or --text_encoder "
                f"{SMALL} for a new one"
            )
        self.text_encoder = self.text_encoder or SMALL
        self.train_text_encoder |= self.text_encoder == SMALL
        if self.train_text_encoder and self.precompute_text:
            raise ValueError(
                f"--precompute_text is for a text encoder that stays as it is, and --text_encoder {self.text_encoder} is "
                "trained along; leave it out"
            )
        if self.streaming:
            raise ValueError("--streaming cannot read captions; encode the images once, with their captions (--codes)")
