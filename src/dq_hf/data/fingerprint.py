"""Sixteen digits that tell models, or the codes that they give, apart."""

import hashlib
import json

# Fields of the configuration that matter in training only.
TRAINING_FIELDS = frozenset(
    "dropout codebook_decay codebook_eps restart_dead_codes commitment_beta codebook_weight budget_targets "
    "budget_gamma".split()
)
DECODER = ("post_quant_conv.", "decoder.")  # weights behind the codes


def fingerprint(model):
    """16 hex digits of a DQ model: a hash of all weights as float32, and of the configuration without its training-only
    fields; the same on every device, and after saving and loading, alone or as part of a joint model.
    """
    config = {name: getattr(model.config, name) for name in model.config.own_field_names() - TRAINING_FIELDS}
    return hash_weights(model.state_dict(), json.dumps(config, sort_keys=True))


def codes_fingerprint(vae):
    """16 hex digits that tell VAEs apart which give other codes: as `fingerprint`, without the decoder."""
    fields = {name for name in vae.config.own_field_names() - TRAINING_FIELDS if not name.startswith("decoder_")}
    config = {name: getattr(vae.config, name) for name in fields}
    weights = {name: weight for name, weight in vae.state_dict().items() if not name.startswith(DECODER)}
    return hash_weights(weights, json.dumps(config, sort_keys=True))


def hash_weights(state_dict, text=""):
    """16 hex digits of a text and of weights by name, as float32."""
    digest = hashlib.sha256(text.encode())
    for name, weight in sorted(state_dict.items()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.float().flatten().cpu().numpy())
    return digest.hexdigest()[:16]
