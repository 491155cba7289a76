"""The text side of training: the vocabulary, text encoders of any kind, and what becomes of a batch's captions."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import make_transformer, make_vae
from hub_server import HubServer, run_client
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    SiglipTextConfig,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from dq_hf import DQForImageGeneration
from dq_hf.modeling.text_dq import encode_prompts
from dq_hf.training.text import CaptionBatches, FrozenText, learn_vocabulary, load_text_encoder, make_text

CAPTIONS = ["A red heart, flat style", "clock: 1:30", "keycap *", "flag of Åland"]


def options(**changes):
    settings = {"text_encoder": "small", "text_length": 6, "train_text_encoder": True, "precompute_text": False}
    return SimpleNamespace(**settings | changes)


@pytest.fixture(scope="module")
def small():
    return make_text(options(), CAPTIONS, CAPTIONS, "cpu")


def test_the_vocabulary_is_the_words_of_the_captions():
    tokenizer = learn_vocabulary(CAPTIONS, 6)
    words = {"a", "red", "heart", "flat", "style", "clock", "1", "30", "keycap", "*", "flag", "of", "åland"}
    assert set(tokenizer.get_vocab()) == words | {"[PAD]", "[UNK]"}
    assert tokenizer.convert_ids_to_tokens(tokenizer("a HEART; of snails")["input_ids"]) == [
        "a",
        "heart",
        "of",
        "[UNK]",
    ]
    assert learn_vocabulary(CAPTIONS[::-1], 6).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    "caption, tokens",
    [
        ("红色的猫, 3只", "红 色 的 猫 3 只"),
        ("コーヒーと猫 cat2", "コ ー ヒ ー と 猫 cat2"),
        ("แมวดำ", "แ ม ว ด ํ า"),  # NFKC takes am into its two signs
        ("고양이 두 마리", "고양이 두 마리"),
        ("élan naïve_1", "élan naïve_1"),
    ],
)
def test_signs_are_the_words_of_languages_without_spaces(caption, tokens):
    tokenizer = learn_vocabulary([caption], 16)
    assert tokenizer.convert_ids_to_tokens(tokenizer(caption)["input_ids"]) == tokens.split()


def test_a_word_that_no_training_step_sees_is_an_unknown_one():
    text = make_text(options(), CAPTIONS, [*CAPTIONS, "a blue heart"], "cpu")
    assert text.tokenizer.convert_ids_to_tokens(text.tokenizer("a blue heart")["input_ids"]) == ["a", "[UNK]", "heart"]
    assert text.encoder.config.vocab_size == len(text.tokenizer) == len(learn_vocabulary(CAPTIONS, 6))


def test_long_captions_are_cut_and_counted_once(caplog):
    make_text(options(text_length=3), CAPTIONS, CAPTIONS, "cpu")
    warnings = [record.message for record in caplog.records if "are cut" in record.message]
    assert len(warnings) == 1 and "1 of 4" in warnings[0]


def save_encoder(folder, kind):
    """A tiny random encoder of each kind that people use, as it lies in a folder or on the Hub."""
    tokenizer = learn_vocabulary(CAPTIONS, 8)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 0}
    bert = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    t5 = {"d_model": 12, "d_ff": 16, "d_kv": 6, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = {
        "bert": lambda: BertModel(BertConfig(**sizes, **bert)),
        "t5": lambda: T5ForConditionalGeneration(T5Config(**sizes, **t5)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**sizes, n_embd=12, n_layer=1, n_head=2)),
        "clip": lambda: CLIPModel(
            CLIPConfig(
                text_config={**sizes, **bert, "eos_token_id": 1},
                vision_config={**bert, "image_size": 8, "patch_size": 4},
            )
        ),
    }[kind]()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", ["bert", "t5", "clip", "gpt2"])
def test_any_text_encoder_gives_its_states_at_once_or_beforehand(tmp_path, kind):
    saved = save_encoder(tmp_path, kind)
    part = {"bert": None, "t5": "encoder", "clip": "text_model", "gpt2": "transformer"}[kind]
    saved = saved if part is None else getattr(saved, part)
    ids = torch.tensor([learn_vocabulary(CAPTIONS, 8)("a red heart")["input_ids"]])
    expected = saved(input_ids=ids).last_hidden_state
    rows = [{"text": caption} for caption in ["a red heart", "", "clock 1"]]
    for precompute in (False, True):
        text = make_text(
            options(text_encoder=str(tmp_path), train_text_encoder=False, precompute_text=precompute),
            [],
            ["a red heart", "clock 1"],
            "cpu",
        )
        arguments = text.arguments(CaptionBatches(text, "text", seed=0)(rows, [0, 1, 2], 0)["text"])
        assert arguments["encoder_attention_mask"].tolist() == [[1] * 3 + [0] * 3, [0] * 6, [1] * 2 + [0] * 4]
        assert torch.allclose(arguments["encoder_hidden_states"][0, :3], expected[0], atol=1e-5)
        assert not any(parameter.requires_grad for parameter in text.encoder.parameters())
        generator = make_transformer(text_hidden_size=12, text_length=6)
        assert text.join(generator) is generator


def test_a_model_that_is_no_text_encoder_is_named(tmp_path):
    SiglipTextConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="text must have a model that .* loads, got one with a SiglipTextConfig"):
        load_text_encoder(str(tmp_path / "text"))


def test_a_model_without_text_is_named(tmp_path):
    DQForImageGeneration.from_models(make_vae(), make_transformer()).save_pretrained(tmp_path / "wordless")
    with pytest.raises(ValueError, match="wordless must have a text encoder, got a model without text"):
        load_text_encoder(str(tmp_path / "wordless"))


def test_an_encoder_whose_tokenizer_is_written_in_python_is_trained_along(tmp_path):
    tokenizer = ByT5Tokenizer()
    sizes = {"d_model": 12, "d_ff": 16, "d_kv": 6, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = make_text(options(text_encoder=str(tmp_path)), CAPTIONS, CAPTIONS, "cpu")
    model = text.join(make_transformer(text_hidden_size=12, text_length=6))
    assert model.unknown is None  # it has no words to hide
    codes, grain_map = torch.zeros(1, 8, 8, dtype=torch.long), torch.zeros(1, 4, 4, dtype=torch.long)
    assert model(codes, grain_map, **text.collate(["heart"])).loss.isfinite()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, small):
    """The folder of a tokenizer and a generator with this text encoder."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    generator = make_transformer(text_hidden_size=128, text_length=6)
    DQForImageGeneration.from_models(make_vae(), generator, small.encoder, small.tokenizer).save_pretrained(folder)
    return folder


def test_an_encoder_is_found_in_a_saved_model_with_text(saved, small):
    tokenizer, encoder = load_text_encoder(str(saved))
    frozen = FrozenText(tokenizer, encoder, 6)
    states, mask = frozen.arguments(frozen.collate(["red heart"])).values()
    expected, expected_mask = encode_prompts(small.tokenizer, small.encoder.eval(), ["red heart"], 6)
    assert torch.equal(mask, expected_mask) and torch.allclose(states, expected, atol=1e-6)
    assert small.fingerprint == frozen.fingerprint != FrozenText(learn_vocabulary(["a"], 6), encoder, 6).fingerprint
    assert FrozenText(tokenizer, torch.compile(encoder), 6).fingerprint == frozen.fingerprint


def test_an_encoder_is_found_in_the_folder_of_a_pipeline(saved, small, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "pipeline")
    (folder / "config.json").unlink()  # which no other pipeline of diffusers has
    tokenizer, encoder = load_text_encoder(str(folder))
    assert tokenizer.get_vocab() == small.tokenizer.get_vocab()
    assert encoder.state_dict().keys() == small.encoder.state_dict().keys()


@pytest.mark.parametrize("kind", ["bert", "t5", "clip", "gpt2"])
def test_several_processes_wait_for_what_is_trained_only(tmp_path, kind):
    """A weight without a gradient that is not named would end the second step of DistributedDataParallel."""
    save_encoder(tmp_path, kind)
    text = make_text(options(text_encoder=str(tmp_path)), CAPTIONS, CAPTIONS, "cpu")
    model = text.join(make_transformer(text_hidden_size=12, text_length=6))
    codes, grain_map = torch.zeros(1, 8, 8, dtype=torch.long), torch.zeros(1, 4, 4, dtype=torch.long)
    model(codes, grain_map, **text.collate(["heart"])).loss.backward()
    untrained = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert untrained == set(model._ddp_params_and_buffers_to_ignore)


LOAD = """
from dq_hf.training.text import TrainedText, load_text_encoder

tokenizer, encoder = load_text_encoder("user/gen")
encoder.save_pretrained("loaded")
print(type(encoder).__name__, TrainedText(tokenizer, encoder, 6).fingerprint)
"""


def test_an_encoder_is_found_in_a_model_on_the_hub(tmp_path, saved, small):
    with HubServer() as hub:
        hub.add("user/gen", saved)
        assert run_client(hub, LOAD, cwd=tmp_path).stdout.split() == ["DistilBertModel", small.fingerprint]
    weights = load_file(tmp_path / "loaded" / "model.safetensors")
    assert all(torch.equal(weight, weights[name]) for name, weight in small.encoder.state_dict().items())


def test_a_small_encoder_learns_with_the_generator_and_some_words_are_hidden_from_it(small):
    torch.manual_seed(0)
    model = small.join(make_transformer(text_hidden_size=128, text_length=6, text_dropout=0.0))
    codes, grain_map = torch.zeros(4, 8, 8, dtype=torch.long), torch.zeros(4, 4, 4, dtype=torch.long)
    inputs = small.collate(["red heart", "clock", "", "flag of åland"])
    model(codes, grain_map, **inputs).loss.backward()
    gradients = {name: weight.grad for name, weight in model.text_encoder.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    words = gradients["embeddings.word_embeddings.weight"].abs().sum(1)
    assert words[small.tokenizer.convert_tokens_to_ids("heart")] > 0

    seen = []
    model.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        for _ in range(200):
            model.train()(codes, grain_map, **inputs)
    unknown = sum((ids == small.tokenizer.unk_token_id).sum().item() for ids in seen)
    assert 30 < unknown < 95  # 5 % of 200 x 6 words: 60, 4.6 standard deviations
    model.eval()(codes, grain_map, **inputs)
    assert torch.equal(seen[-1], inputs["input_ids"])
