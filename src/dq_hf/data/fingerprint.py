"""Fingerprints of sixteen digits: of a model, of the codes that it gives, or of what it makes of codes."""

import hashlib
import json

# Fields of the configuration that matter in training only.
TRAINING_FIELDS = frozenset(
    "dropout codebook_decay codebook_eps restart_dead_codes commitment_beta codebook_weight budget_targets "
    "budget_gamma router_gradient".split()
)
DECODER = ("post_quant_conv.", "decoder.")  # weights behind the codes
CODEBOOK = ("quantizer.codebook", "quantizer.cluster_size")
THRESHOLDS = "router.thresholds"
# Beginnings of fields that matter only to an encoder, and parts of fields that matter only to training or sampling.
ENCODER_FIELDS = ("router", "entropy_", "encoder_", "block_out_channels", "layers_per_block")
UNREAD = ("dropout", "loss_weight", "sampling_defaults")


def fingerprint(model):
    """16 hex digits of a DQ model: a hash of all weights as float32, and of the configuration without its training-only
    fields; the same on every device, and after saving and loading, alone or as part of a joint model.
    """
    fields, weights = fields_and_weights(model)
    return hash_weights(weights, json.dumps(fields, sort_keys=True))


def codes_fingerprint(vae):
    """16 hex digits that tell VAEs apart which give other codes: as `fingerprint`, without the decoder."""
    fields, weights = fields_and_weights(vae)
    fields = {name: value for name, value in fields.items() if not name.startswith("decoder_")}
    weights = {name: weight for name, weight in weights.items() if not name.startswith(DECODER)}
    return hash_weights(weights, json.dumps(fields, sort_keys=True))


def decoding_fingerprint(vae, transformer=None, text_encoder=None, text_tokenizer=None):
    """16 hex digits that tell models apart which make other images of codes, or give streams another probability.

    Args:
        transformer, text_encoder, text_tokenizer: None: probabilities do not depend on them.
    """
    fields, weights = fields_and_weights(vae)
    fields = {name: value for name, value in fields.items() if not name.startswith(ENCODER_FIELDS)}
    weights = {name: weight for name, weight in weights.items() if name.startswith(DECODER + CODEBOOK)}
    digits = hash_weights(weights, json.dumps(fields, sort_keys=True))
    if transformer is not None:
        fields, weights = fields_and_weights(transformer)
        fields = {name: value for name, value in fields.items() if not any(part in name for part in UNREAD)}
        digits = hash_weights(weights, digits + json.dumps(fields, sort_keys=True))
    if text_encoder is not None:
        words = json.dumps(text_tokenizer.get_vocab(), sort_keys=True)
        digits = hash_weights(uncompiled(text_encoder).state_dict(), digits + words)
    return digits


def text_fingerprint(text_encoder, text_tokenizer):
    """16 hex digits that tell text encoders, or their vocabularies, apart."""
    facts = type(uncompiled(text_encoder)).__name__, text_tokenizer.get_vocab()
    return hash_weights(uncompiled(text_encoder).state_dict(), json.dumps(facts, sort_keys=True))


def fields_and_weights(model):
    """What a fingerprint is made of. A router's thresholds are a field, as they were before they became weights."""
    fields = {name: getattr(model.config, name) for name in model.config.own_field_names() - TRAINING_FIELDS}
    weights = uncompiled(model).state_dict()
    if (thresholds := weights.pop(THRESHOLDS, None)) is not None:
        calibrated = thresholds.isfinite().all()
        fields["entropy_thresholds"] = thresholds.tolist() if calibrated else model.config.initial_thresholds
    return fields, weights


def uncompiled(model):
    """The model that `torch.compile` made this one of, or itself: its weights have the names that they have in its file."""
    return getattr(model, "_orig_mod", model)


def hash_weights(state_dict, text=""):
    """16 hex digits of a text and of weights by name, as float32."""
    digest = hashlib.sha256(text.encode())
    for name, weight in sorted(state_dict.items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        if is_quantized(weight):
            weight = weight.dequantize()
        digest.update(weight.float().flatten().cpu().numpy())
    return digest.hexdigest()[:16]


def is_quantized(weight):
    """Whether a tensor is made of others, as those of torchao are, which keep numbers of fewer bits."""
    return hasattr(weight, "__tensor_flatten__")
