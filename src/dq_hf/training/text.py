"""The text side of a generator's training: vocabulary and text encoder, and what becomes of a batch's captions."""

import hashlib
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

from ..data.captions import CaptionDraw
from ..hub.download import model_type_of
from ..modeling.configuration_dq import DQConfig
from ..modeling.text_dq import (
    check_tokenizer,
    encode_tokens,
    pad_tokens,
    text_encoder_class,
    tokenize,
    unused_parameters,
)
from .options import SMALL

SMALL_SIZES = {"dim": 128, "hidden_dim": 512, "n_layers": 2, "n_heads": 4}
MOST_WORDS = 30_000  # of its vocabulary, the most frequent ones
# Scripts that put no spaces between words, of which each sign is a token.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD = rf"[{UNSPACED}]|[\w&&[^{UNSPACED}]]+|[^\w\s.,;:]"
HIDDEN_WORDS = 0.05  # share of the words that training hides from it, so that it learns what an unknown word is
WRONG_CAPTIONS = "wrong_captions"  # column
TEXTS_AT_ONCE = 64  # that are encoded beforehand


def make_text(args, train_captions, captions, device):
    """Tokenizer and text encoder for these options, as a `TrainedText`, or a `FrozenText`.

    Args:
        args: `text_encoder`, `text_length`, `train_text_encoder` and `precompute_text`.
        train_captions: the distinct ones to train on; a vocabulary has no other words, for they would never be learned.
        captions: all distinct ones, to train on and to measure on.
        device: of a text encoder that stays as it is.

    Raises:
        OSError, ValueError: there is no such text encoder, or it does not fit the length.
    """
    if args.text_encoder == SMALL:
        tokenizer = learn_vocabulary(train_captions, args.text_length)
        encoder = small_encoder(tokenizer, args.text_length)
    else:
        tokenizer, encoder = load_text_encoder(args.text_encoder)
    check_tokenizer(tokenizer, encoder.config, args.text_length)
    tokenize(tokenizer, captions, args.text_length)  # says how many are cut
    if args.train_text_encoder:
        return TrainedText(tokenizer, encoder, args.text_length)
    if args.precompute_text:
        return PrecomputedText(tokenizer, encoder.to(device), args.text_length, captions)
    return FrozenText(tokenizer, encoder.to(device), args.text_length)


def learn_vocabulary(captions, length):
    """A tokenizer whose tokens are the words of the captions, in lower case, and signs: those other than . , ; : and those of
    scripts without spaces.
    """
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
    trainer = trainers.WordLevelTrainer(vocab_size=MOST_WORDS, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    words.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=length
    )


def small_encoder(tokenizer, length):
    """A new text encoder of two layers for a vocabulary."""
    return DistilBertModel(
        DistilBertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=length,
            pad_token_id=tokenizer.pad_token_id,
            **SMALL_SIZES,
        )
    )


def load_text_encoder(name):
    """Tokenizer and text encoder, in float32, of a folder or repository; of a saved model with text, its own two.

    Raises:
        OSError, ValueError: there are none, or none that transformers loads as such.
    """
    is_of_diffusers = Path(name, "model_index.json").is_file() and not Path(name, "config.json").is_file()
    model_type, commit = (None, None) if is_of_diffusers else model_type_of(name)
    is_whole = is_of_diffusers or model_type == DQConfig.model_type
    if (
        model_type == DQConfig.model_type
        and DQConfig.from_pretrained(name, revision=commit).text_encoder_config is None
    ):
        raise ValueError(f"{name} must have a text encoder, got a model without text; give another, or small")
    tokens, states = (
        {"revision": commit, "subfolder": part if is_whole else ""} for part in ("tokenizer", "text_encoder")
    )
    config = AutoConfig.from_pretrained(name, **states).get_text_config()  # of CLIP, that of its text model
    kind = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    try:
        encoder = kind.from_pretrained(name, config=config, dtype=torch.float32, **states)
    except ValueError as error:
        raise ValueError(
            f"{name} must have a model that AutoModelForTextEncoding or AutoModel of transformers loads, got one with a "
            f"{type(config).__name__}; save its text encoder alone, or take another ({error})"
        ) from error
    encoder.config.architectures = [type(encoder).__name__]  # not the class that the checkpoint was saved from
    text_encoder_class(encoder.config)  # raises if it reads more than a text
    return AutoTokenizer.from_pretrained(name, **tokens), encoder


class TrainedText:
    """Captions as tokens, for a text encoder that is trained along (`GeneratorWithText`).

    Args:
        tokenizer, encoder: of transformers.
        length: slots for tokens.
    """

    def __init__(self, tokenizer, encoder, length):
        self.tokenizer = tokenizer
        self.encoder = encoder
        self.length = length

    @property
    def fingerprint(self):
        """16 hex digits that tell vocabularies apart."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16]

    def join(self, transformer):
        """The model that is trained."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)  # not of tokenizers written in Python
        whole_words = isinstance(getattr(backend, "model", None), models.WordLevel)
        return GeneratorWithText(transformer, self.encoder, self.tokenizer.unk_token_id if whole_words else None)

    def collate(self, captions):
        """What a batch holds of its captions, tensors by name."""
        input_ids, attention_mask = pad_tokens(self.tokenizer, captions, self.length)
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def arguments(self, collated):
        """What the model takes, by the names of its arguments."""
        return collated


class FrozenText(TrainedText):
    """Captions as states of a text encoder that stays as it is."""

    def __init__(self, tokenizer, encoder, length):
        super().__init__(tokenizer, encoder.eval().requires_grad_(False), length)

    def join(self, transformer):
        return transformer

    @torch.no_grad()
    def arguments(self, collated):
        states, mask = encode_tokens(self.encoder, **collated)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}


class PrecomputedText(FrozenText):
    """As `FrozenText`, but the states of each of these captions are computed once, and kept in memory."""

    def __init__(self, tokenizer, encoder, length, captions):
        super().__init__(tokenizer, encoder, length)
        self.places = {caption: place for place, caption in enumerate(["", *captions])}
        texts, parts = list(self.places), []
        for first in tqdm(range(0, len(texts), TEXTS_AT_ONCE), desc="encode captions"):
            arguments = super().arguments(super().collate(texts[first : first + TEXTS_AT_ONCE]))
            parts.append([value.cpu() for value in arguments.values()])
        self.states, self.masks = (torch.cat(part) for part in zip(*parts))

    def collate(self, captions):
        place = torch.tensor([self.places[caption] for caption in captions])
        return {"encoder_hidden_states": self.states[place], "encoder_attention_mask": self.masks[place]}

    def arguments(self, collated):
        return collated


class CaptionBatches:
    """Further entries of a collator: "text", one of each row's captions, and "wrong_text" where rows have such.

    Args:
        text: a `TrainedText`.
        column: of the captions.
        seed: of the draw.
        wrong_column: of captions that belong to other images.
    """

    def __init__(self, text, column, seed, wrong_column=None):
        self.text = text
        self.draws = {"text": CaptionDraw(column, seed)}
        if wrong_column is not None:
            self.draws["wrong_text"] = CaptionDraw(wrong_column, seed)

    def __call__(self, rows, pictures, epoch):
        return {name: self.text.collate(draw(rows, pictures, epoch)) for name, draw in self.draws.items()}


class GeneratorWithText(nn.Module):
    """A generator and the text encoder that is trained along with it, as one model.

    Args:
        transformer: `DQTransformerForImageGeneration` with text.
        text_encoder: of transformers.
        unknown: token that takes the place of `HIDDEN_WORDS` of all words in training; None: no word is hidden.
    """

    def __init__(self, transformer, text_encoder, unknown=None):
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.unknown = unknown

    @property
    def config(self):
        """The generator's."""
        return self.transformer.config

    @property
    def _ddp_params_and_buffers_to_ignore(self):
        """Names of what `forward` does not train, and DistributedDataParallel need not wait for."""
        return [f"text_encoder.{name}" for name in unused_parameters(self.text_encoder)]

    def forward(self, codes, grain_map, class_labels=None, input_ids=None, attention_mask=None):
        """As the generator's, of token ids (B, T) and their mask in place of states; None: no text."""
        if input_ids is None:
            return self.transformer(codes, grain_map, class_labels)
        if self.training and self.unknown is not None:
            hidden = torch.rand(input_ids.shape, device=input_ids.device) < HIDDEN_WORDS
            input_ids = input_ids.masked_fill(hidden & (attention_mask > 0), self.unknown)
        return self.transformer(
            codes, grain_map, class_labels, *encode_tokens(self.text_encoder, input_ids, attention_mask)
        )
