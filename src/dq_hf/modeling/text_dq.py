"""Prompts as the states that a generator reads: any tokenizer with any text encoder of transformers (frozen or not)."""

import inspect

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING
from transformers.utils import logging

from .conditioning_dq import inputs_of
from .modeling_utils_dq import call_device, check_indices, evaluation_mode

logger = logging.get_logger(__name__)

USE_ENCODER = "give the encoder alone, as AutoModelForTextEncoding, CLIPTextModel or T5EncoderModel load it"


def tokenize(tokenizer, prompts, length):
    """Token ids (B, length) long of prompts and their mask (B, length) long, 0 where there is no token.

    A longer prompt is cut, and one warning says how many are. An empty prompt has no token at all.

    Args:
        tokenizer: of transformers, with a padding token.
        prompts: one text or a list.
        length: of the result, `text_length` of the generator.

    Raises:
        TypeError, ValueError: prompts that are no texts, or none.
    """
    prompts = as_prompts(prompts)
    tokens = pad_tokens(tokenizer, prompts, length)
    uncut = tokenizer(prompts, verbose=False)["input_ids"]  # last: a tokenizer is saved as it was last asked
    if num_cut := sum(len(ids) > length for ids in uncut):
        logger.warning(f"{num_cut} of {len(prompts)} prompts have more than {length} tokens and are cut")
    return tokens


def pad_tokens(tokenizer, prompts, length):
    """As `tokenize`, of a list of texts, without its checks and its warning."""
    tokens = tokenizer(
        prompts,
        truncation=True,
        max_length=length,
        padding="max_length",
        padding_side="right",  # whatever the tokenizer's own: slot i holds token i
        return_attention_mask=True,
        return_tensors="pt",
    )
    is_empty = torch.tensor([not prompt.strip() for prompt in prompts])
    return tokens["input_ids"], tokens["attention_mask"].masked_fill(is_empty[:, None], 0)


def unknown_words(tokenizer, prompts):
    """What a list of texts has that is one and the same unknown token to the tokenizer, each once, in quotation marks.

    A slow tokenizer does not say which words it knows: then the whole text.
    """
    tokens = tokenizer(prompts, verbose=False, return_special_tokens_mask=True)
    words = []
    for i, ids in enumerate(tokens["input_ids"]):
        added = tokens["special_tokens_mask"][i]  # before and behind the text; CLIP ends it with its unknown token
        for place in range(len(ids)):
            if ids[place] == tokenizer.unk_token_id and not added[place]:
                span = tokens.token_to_chars(i, place) if tokenizer.is_fast else (None, None)
                words.append(repr(prompts[i][slice(*span)]))
    return list(dict.fromkeys(words))


def as_prompts(prompts, name="prompt"):
    """A list of texts, from one or a list; TypeError or ValueError."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, (list, tuple)):
        raise TypeError(f"{name} must be a text or a list of texts, got {type(prompts).__name__}")
    if not texts:
        raise ValueError(f"{name} must hold at least one text, got an empty list")
    if others := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"{name} must be a text or a list of texts, got {others[0]!r} in it")
    return list(texts)


def encode_tokens(text_encoder, input_ids, attention_mask=None):
    """States (B, T, d) of a text encoder, 0 where there is no token, and their mask (B, T).

    Args:
        text_encoder: any of transformers whose output has `last_hidden_state`.
        input_ids: (B, T) integers.
        attention_mask: (B, T), 0 where there is no token; None: all are there.

    Raises:
        TypeError, ValueError: tensors of another type, shape or range.
    """
    embedding = text_encoder.get_input_embeddings()
    device = call_device(text_encoder, embedding)
    input_ids = check_indices("input_ids", input_ids, ("B", "T"), embedding.num_embeddings, device)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    attention_mask = check_indices("attention_mask", attention_mask, input_ids.shape, 2, device)
    read = attention_mask.clone()
    read[:, 0] |= attention_mask.sum(1) == 0  # attention over nothing is not a number
    output = text_encoder(input_ids=input_ids, attention_mask=read)
    if "last_hidden_state" not in output:
        raise ValueError(f"{type(text_encoder).__name__} gives no states of a text; {USE_ENCODER}")
    states = output.last_hidden_state
    return states.masked_fill(attention_mask[..., None] == 0, 0), attention_mask


def unused_parameters(text_encoder):
    """Names of its parameters that no state depends on: those of the heads that make one vector of a text."""
    heads = {"pooler", "text_projection", "head"}
    return [name for name, _ in text_encoder.named_parameters() if heads & set(name.split("."))]


def encode_prompts(tokenizer, text_encoder, prompts, length):
    """encoder_hidden_states (B, length, d) and encoder_attention_mask (B, length) of prompts, see `tokenize`.

    Each is read alone: beside others its states may round differently, and a generated image should not depend on its
    neighbours. Next to sampling, this takes no time.
    """
    input_ids, attention_mask = tokenize(tokenizer, prompts, length)
    if words := unknown_words(tokenizer, as_prompts(prompts)):
        named = ", ".join(words[:8]) + (" and others" if len(words) > 8 else "")
        logger.warning(f"the text encoder does not know these words, and reads all of them alike: {named}")
    encoded = [encode_tokens(text_encoder, *each) for each in zip(input_ids.split(1), attention_mask.split(1))]
    states, masks = zip(*encoded)
    return torch.cat(states), torch.cat(masks)


@torch.no_grad()
def prompt_arguments(config, text_encoder, tokenizer, prompt=None, negative_prompt=None):
    """What `generate_steps` takes for prompts: {argument: tensor}.

    Args:
        config: `DQTransformerConfig`.
        text_encoder, tokenizer: of the model, or None.
        prompt: a text or a list of texts; None: no text.
        negative_prompt: a text or a list of texts, for the unconditional half of guidance; None: no text.

    Raises:
        TypeError, ValueError: prompts that are no texts, or none; a model that takes no prompt.
    """
    arguments = {}
    for prefix, texts in (("", prompt), ("negative_", negative_prompt)):
        name = f"{prefix}prompt"
        if texts is None:
            continue
        require_text(name, config)
        texts = as_prompts(texts, name)
        if text_encoder is None or tokenizer is None:
            raise ValueError(
                f"{name} needs a text encoder and its tokenizer, which this model has not: join them by from_models, or "
                "give the texts' states"
            )
        with evaluation_mode(text_encoder):
            states, mask = encode_prompts(tokenizer, text_encoder, texts, config.text_length)
        arguments |= {f"{prefix}encoder_hidden_states": states, f"{prefix}encoder_attention_mask": mask}
    return arguments


def require_text(name, config):
    """Raise ValueError, which says what the model takes, if it is without text."""
    if config.text_length is None:
        raise ValueError(f"{name} is for a model with text; this one takes {inputs_of(config)}")


def text_encoder_config(entries):
    """The configuration of a text encoder from the entries of its file; ValueError if transformers has no such model."""
    kind = entries.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"text_encoder_config must have the model_type of a model of transformers, got {kind!r}")
    return CONFIG_MAPPING[kind].from_dict(entries)


def text_encoder_class(config):
    """The class of transformers that a text encoder's configuration names, else the one of AutoModelForTextEncoding.

    Raises:
        ValueError: a class that transformers does not have (code of other origin is never run), or no text encoder.
    """
    name = config.architectures[0] if config.architectures else None
    found = getattr(transformers, name, None) if name else MODEL_FOR_TEXT_ENCODING_MAPPING.get(type(config), None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ValueError(
            f"the text encoder must be a class of transformers, got {name or type(config).__name__}; {USE_ENCODER}"
        )
    arguments = inspect.signature(found.forward).parameters
    if "input_ids" not in arguments or {"decoder_input_ids", "pixel_values"} & set(arguments):
        raise ValueError(f"{found.__name__} reads more than a text; {USE_ENCODER}")
    if not isinstance(config, found.config_class):
        raise ValueError(f"the text encoder {name} has a {found.config_class.__name__}, got a {type(config).__name__}")
    return found


def check_text_encoder(config, generator):
    """Raise ValueError unless a text encoder fits a generator, by their configurations."""
    found, length = text_encoder_class(config).__name__, generator.text_length
    if length is None:
        raise ValueError("the generator was trained without text (text_length None): leave out the text encoder")
    if config.hidden_size != generator.text_hidden_size:
        raise ValueError(
            f"text encoder and generator do not fit: the states of {found} are {config.hidden_size} wide, the "
            f"generator's text_hidden_size is {generator.text_hidden_size}"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and longest < length:
        raise ValueError(
            f"text encoder and generator do not fit: {found} reads at most {longest} tokens, the generator's text_length "
            f"is {length}"
        )


def check_tokenizer(tokenizer, config, length):
    """Raise TypeError or ValueError unless a tokenizer fits a text encoder, by its configuration, and a text length."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"the tokenizer must be one of transformers, got {type(tokenizer).__name__}")
    if config is None:
        raise ValueError("a tokenizer needs its text encoder: give text_encoder, too, or tokenizer=None")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"tokenizer and text encoder do not fit: the tokenizer has {len(tokenizer)} tokens, the text encoder "
            f"{config.vocab_size}"
        )
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no padding token: set tokenizer.pad_token to one that the encoder knows")
    if tokenizer.model_max_length < length:
        raise ValueError(
            f"the tokenizer gives at most {tokenizer.model_max_length} tokens (model_max_length), the generator's "
            f"text_length is {length}"
        )
