"""A generator in training: its parameters, a batch as its arguments, its held-out losses, and all of its weights."""

import math

import torch
from accelerate import DistributedType
from transformers import PreTrainedModel

from ..modeling.modeling_dq import DQForImageGeneration
from ..modeling.modeling_dqtransformer import DQTransformerForImageGeneration
from .losses import LOSSES, named_losses, summed_losses
from .text import GeneratorWithText


def parameter_groups(model, weight_decay):
    """Weight decay on the weights of linear layers only (paper appendix; the release)."""
    decayed = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    decayed_ids = {id(weight) for weight in decayed}
    others = [parameter for parameter in model.parameters() if id(parameter) not in decayed_ids]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def compile_blocks(model):
    """Compile in place the blocks of generator and text encoder, those that must not be split, for streams of any length."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    kinds = {name for part in parts for name in part._no_split_modules or ()}
    for module in model.modules():
        if type(module).__name__ in kinds:
            module.compile(dynamic=True)


class BestLoss:
    """The smallest held-out loss so far and its step, kept in the checkpoints."""

    def __init__(self):
        self.value, self.step = math.inf, None

    def improve(self, loss, step):
        """Whether `loss` is the smallest so far; it is remembered."""
        improved = loss < self.value
        if improved:
            self.value, self.step = loss, step
        return improved

    def state_dict(self):
        return {"value": self.value, "step": self.step}

    def load_state_dict(self, state):
        self.value, self.step = state["value"], state["step"]


@torch.no_grad()
def codes_of(vae, batch, config):
    """Arguments of the generator: codes and grain maps, from the cache or encoded now, and class labels if it has any."""
    source = vae.encode(batch["pixel_values"]) if "pixel_values" in batch else batch
    labels = batch["class_labels"] if config.num_classes else None
    return {"codes": source["codes"], "grain_map": source["grain_map"], "class_labels": labels}


def text_of(text, batch, name="text"):
    """Arguments of the generator: the batch's captions of this name, if it has text."""
    return {} if text is None else text.arguments(batch[name])


@torch.no_grad()
def evaluate(accelerator, vae, model, loader, config, text):
    """Held-out losses in nats, means over all targets, whatever the batches; of text also what it is worth."""
    model.eval()
    kinds = {"": "text"} | ({"_no_text": None, "_wrong_text": "wrong_text"} if text is not None else {})
    rows = []
    for batch in loader:
        images = codes_of(vae, batch, config)
        outputs = (model(**images, **(text_of(text, batch, name) if name else {})) for name in kinds.values())
        sums = torch.stack([summed_losses(output, config) for output in outputs], dim=1)
        rows.append(accelerator.gather_for_metrics(sums))
    sums, counts = torch.cat(rows).cpu().double().sum(0).unbind(1)  # (kinds, 1 + K) each
    means = dict(zip(kinds, sums / counts))
    losses = named_losses(means[""][0], means[""][1:], config)
    figures = {f"test_{name}": losses[name].item() for name in LOSSES[:3]}
    if text is not None:
        figures |= {f"test_content_loss{kind}": mean[0].item() for kind, mean in means.items()}
        figures["test_text_worth"] = figures["test_content_loss_no_text"] - figures["test_content_loss"]
    return figures


def whole_model(accelerator, model):
    """The generator with all of its weights; where FSDP has shared them out, a copy on the main process, else None."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.unwrap_model(model, keep_torch_compile=False)
    weights = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return None
    copy = DQTransformerForImageGeneration(model.config)
    if isinstance(model, GeneratorWithText):
        encoder = model.text_encoder
        copy = GeneratorWithText(copy, type(encoder)(encoder.config))
    copy.load_state_dict(weights)
    return copy.to(accelerator.device)


def joint_model(vae, whole, text):
    """Tokenizer, generator and, if there is text, what reads it, as one model."""
    if text is None:
        return DQForImageGeneration.from_models(vae, whole)
    encoder = text.encoder
    if isinstance(whole, GeneratorWithText):
        whole, encoder = whole.transformer, whole.text_encoder
    return DQForImageGeneration.from_models(vae, whole, encoder, text.tokenizer)
