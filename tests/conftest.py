import json
import math
import os
import resource
from contextlib import contextmanager
from datetime import timedelta

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["OMP_NUM_THREADS"] = "1"  # and torch, here and in the processes that tests start: they compare bit for bit

import datasets  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from hypothesis import settings  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from dq_hf.modeling.configuration_dqtransformer import DQTransformerConfig  # noqa: E402
from dq_hf.modeling.configuration_dqvae import DQVAEConfig  # noqa: E402
from dq_hf.modeling.modeling_dqtransformer import DQTransformerForImageGeneration  # noqa: E402
from dq_hf.modeling.modeling_dqvae import DQVAEModel  # noqa: E402

torch.set_num_threads(1)
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # seconds; 5 after every epoch of a stream add up to minutes
settings.register_profile("dq", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("dq")

# Whole files go to one process each, in this order: what takes minutes first, so that none is left with it at the end.
LONG_FILES = ("test_training_engine.py", "test_docs.py", "test_hub.py", "test_examples.py", "test_evaluation.py")


def pytest_collection_modifyitems(items):
    """Put the long files first; the rest keeps its order."""
    items.sort(key=lambda item: LONG_FILES.index(item.path.name) if item.path.name in LONG_FILES else len(LONG_FILES))


def make_vae(**overrides):
    """A DQ-VAE for 16x16 images, codes of 4x4 and 2x2 pixels, in evaluation mode."""
    torch.manual_seed(0)
    sizes = dict(
        image_size=16,
        granularities=[4, 2],
        block_out_channels=[8, 8, 16],
        layers_per_block=1,
        norm_num_groups=4,
        z_channels=8,
        codebook_size=16,
        codebook_dim=8,
        router_norm_num_groups=4,
    )
    return DQVAEModel(DQVAEConfig(**(sizes | overrides))).eval()


def make_transformer(**overrides):
    """A DQ-Transformer for the codes of `make_vae`, in evaluation mode.

    Its weights are so large that every logit depends clearly on every element before it.
    """
    sizes = dict(
        grid_sizes=[[4, 4], [8, 8]],
        codebook_size=16,
        hidden_size=16,
        num_attention_heads=2,
        num_position_layers=2,
        num_content_layers=2,
    )
    model = DQTransformerForImageGeneration(DQTransformerConfig(**(sizes | overrides))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.6, generator=generator)
    return model


WORDS = ("<pad>", "<unk>", "<end>", "a", "red", "blue", "heart", "sun", "and")
TEXT = dict(text_hidden_size=8, text_length=5)  # of a generator that reads the states of `make_text_encoder`


def make_text_tokenizer(words=WORDS, **special):
    """A tokenizer of few words, whose texts end in <end>."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", 2)])
    special = dict(pad_token="<pad>", unk_token="<unk>", eos_token="<end>", model_max_length=8) | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_text_encoder(kind="clip"):
    """A text encoder of transformers for `make_text_tokenizer`, "clip", "t5" or "bert", with states of 8 numbers."""
    sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    special = dict(pad_token_id=0, bos_token_id=2, eos_token_id=2, vocab_size=len(WORDS))
    torch.manual_seed(0)
    if kind == "t5":
        return T5EncoderModel(T5Config(d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, **special)).eval()
    if kind == "bert":
        return BertModel(BertConfig(**sizes, max_position_embeddings=8, **special)).eval()
    return CLIPTextModel(CLIPTextConfig(**sizes, max_position_embeddings=8, **special)).eval()


def seeded(seed=0):
    """A generator of random numbers."""
    return torch.Generator().manual_seed(seed)


def edit_weights(path, change):
    """Rewrite a safetensors file after `change(tensors)`."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(path, **changes):
    """Change entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@contextmanager
def full_disk(num_bytes):
    """While it lasts no file can grow above this size: writing ends as on a disk that has no more room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def in_two_processes(folder, target, *arguments):
    """What `target(rank, *arguments)` returns in each of two processes that torch.distributed joins.

    Forked, because new processes would take seconds to import everything.
    """
    mp.start_processes(as_rank, args=(str(folder), target, arguments), nprocs=2, start_method="fork")
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in (0, 1)]


def as_rank(rank, folder, target, arguments):
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(minutes=2))
    torch.save(target(rank, *arguments), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def tiny_vae():
    """With an entropy router."""
    return make_vae()


@pytest.fixture(scope="session")
def tiny_vae_feature():
    """With a feature router."""
    return make_vae(router="feature")


@pytest.fixture(scope="session")
def tiny_transformer():
    """Unconditional."""
    return make_transformer()


@pytest.fixture(scope="session")
def tiny_transformer_class():
    """Of three classes, with a hidden class for guidance."""
    return make_transformer(num_classes=3, id2label={0: "sun", 1: "moon", 2: "star"}, class_dropout=0.2)


# VGG16 as torchvision numbers its `features`: (index, channels in, channels out) of the convolutions.
VGG16 = [
    *[(0, 3, 64), (2, 64, 64)],
    *[(5, 64, 128), (7, 128, 128)],
    *[(10, 128, 256), (12, 256, 256), (14, 256, 256)],
    *[(17, 256, 512), (19, 512, 512), (21, 512, 512)],
    *[(24, 512, 512), (26, 512, 512), (28, 512, 512)],
]


@pytest.fixture(scope="session")
def vgg(tmp_path_factory):
    """A folder with `model.safetensors`, random weights in the names and shapes of timm/vgg16.tv_in1k."""
    generator = torch.Generator().manual_seed(0)
    weights = {"head.fc.weight": torch.zeros(2, 512)}
    for index, inputs, outputs in VGG16:
        deviation = math.sqrt(2 / (9 * inputs))
        weights[f"features.{index}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) * deviation
        weights[f"features.{index}.bias"] = torch.randn(outputs, generator=generator) * 0.1
    folder = tmp_path_factory.mktemp("vgg")
    save_file(weights, folder / "model.safetensors")
    yield folder
    (folder / "model.safetensors").unlink()  # 59 MB


@pytest.fixture(scope="session")
def heads(tmp_path_factory):
    """A `vgg.pth` of random linear heads, in the names and shapes of lpips' own."""
    path = tmp_path_factory.mktemp("heads") / "vgg.pth"
    generator = torch.Generator().manual_seed(1)
    widths = enumerate((64, 128, 256, 512, 512))
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1, generator=generator) for i, n in widths}, path)
    return path
