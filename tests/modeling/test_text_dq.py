"""Prompts to states of fixed length, by any text encoder of transformers; and models that have one as a part."""

import json
import re
import shutil

import pytest
import torch
from conftest import (
    TEXT,
    WORDS,
    edit_weights,
    make_text_encoder,
    make_text_tokenizer,
    make_transformer,
    make_vae,
    seeded,
)
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForTextEncoding,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5Model,
)

from dq_hf.modeling.configuration_dq import DQConfig
from dq_hf.modeling.modeling_dq import DQForImageGeneration
from dq_hf.modeling.text_dq import encode_prompts, encode_tokens, tokenize
from dq_hf.pipelines.pipeline_dq import DQPipeline

KINDS = ("clip", "t5", "bert")
LENGTH = TEXT["text_length"]
PROMPTS = ["a red heart", "", "sun and a blue heart", "moon", "  "]


def make_model(kind="clip", **overrides):
    """With a text encoder of a kind, without classes unless they are asked for."""
    transformer = make_transformer(**TEXT, **SMALL, **overrides)
    parts = make_vae(image_size=8), transformer, make_text_encoder(kind), make_text_tokenizer()
    return DQForImageGeneration.from_models(*parts).eval()


SMALL = dict(grid_sizes=[[2, 2], [4, 4]])
CLASSES = dict(num_classes=3, class_dropout=0.2)


def test_tokens_have_one_length_and_an_empty_prompt_has_none(caplog):
    input_ids, mask = tokenize(make_text_tokenizer(padding_side="left"), PROMPTS, LENGTH)
    assert input_ids.tolist()[0] == [3, 4, 6, 2, 0] and input_ids.tolist()[3] == [1, 2, 0, 0, 0]
    assert input_ids.tolist()[2] == [7, 8, 3, 5, 2]  # cut, but the end is still there
    assert mask.sum(1).tolist() == [4, 0, 5, 2, 0] and mask[0].tolist() == [1, 1, 1, 1, 0]
    assert [record.message for record in caplog.records] == ["1 of 5 prompts have more than 5 tokens and are cut"]
    assert tokenize(make_text_tokenizer(), "sun", LENGTH)[0].shape == (1, LENGTH)


@pytest.mark.parametrize(
    ("end", "is_fast", "words"),
    [
        ("<end>", True, "'purple', 'dragon'"),
        ("<unk>", True, "'purple', 'dragon'"),  # as CLIP's
        ("<end>", False, "'a purple dragon', 'purple heart'"),
    ],
)
def test_words_that_the_encoder_does_not_know_are_named(caplog, monkeypatch, end, is_fast, words):
    tokenizer, encoder = make_text_tokenizer(), make_text_encoder()
    special_tokens = [(end, tokenizer.convert_tokens_to_ids(end))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {end}", special_tokens=special_tokens)
    monkeypatch.setattr(type(tokenizer), "is_fast", is_fast)
    encode_prompts(tokenizer, encoder, ["a purple dragon", "", "a heart", "purple heart"], LENGTH)
    said = f"the text encoder does not know these words, and reads all of them alike: {words}"
    assert [record.message for record in caplog.records] == [said]
    encode_prompts(tokenizer, encoder, "a heart", LENGTH)
    assert len(caplog.records) == 1


def test_of_many_unknown_words_the_first_are_named(caplog):
    encode_prompts(make_text_tokenizer(), make_text_encoder(), [f"word{i}" for i in range(20)], LENGTH)
    first = ", ".join(f"'word{i}'" for i in range(8))
    assert [record.message.endswith(f"alike: {first} and others") for record in caplog.records] == [True]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_states_are_the_encoders_own_and_of_no_other_prompt(kind):
    encoder, tokenizer = make_text_encoder(kind), make_text_tokenizer()
    states, mask = encode_prompts(tokenizer, encoder, PROMPTS, LENGTH)
    assert states.shape == (5, LENGTH, 8) and not states[mask == 0].any() and states.isfinite().all()
    for i, prompt in enumerate(PROMPTS):
        alone = encode_prompts(tokenizer, encoder, prompt, LENGTH)[0][0]
        assert torch.equal(alone, states[i])  # whatever its neighbours are, to the last bit
    ids = torch.tensor([[3, 4, 6, 2]])
    torch.testing.assert_close(encoder(input_ids=ids).last_hidden_state, states[:1, :4])
    torch.testing.assert_close(encode_tokens(encoder, ids)[0], states[:1, :4])


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ([], ValueError, "at least one text"),
        (["sun", 3], TypeError, "got 3 in it"),
        ([None], TypeError, "got None in it"),
        (3, TypeError, "a list of texts, got int"),
        (b"sun", TypeError, "got bytes"),
        ([["sun"]], TypeError, "got .'sun'. in it"),
    ],
)
def test_prompts_that_are_no_texts_are_refused(prompts, error, message):
    with pytest.raises(error, match=message):
        tokenize(make_text_tokenizer(), prompts, LENGTH)
    model = make_model()
    for name in ("prompt", "negative_prompt"):
        with pytest.raises(error, match=f"^{name} .*{message}"):
            model.generate(**{name: prompts})


@pytest.mark.parametrize(
    ("kind", "loader"), [("clip", DQForImageGeneration), ("t5", AutoModel), ("bert", DQForImageGeneration)]
)
def test_a_saved_model_has_its_text_encoder_and_gives_the_same_images(kind, loader, tmp_path):
    model = make_model(kind)
    model.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", type(model.text_encoder).__name__]
    loaded, info = loader.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert type(loaded.text_encoder) is type(model.text_encoder) and not any(info.values())
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    options = dict(prompt=PROMPTS[:3], negative_prompt="blue", guidance_scale=2.0, temperature=0.9)
    first, second = (each.generate(generator=seeded(1), **options) for each in (model, loaded))
    assert torch.equal(first.pixel_values, second.pixel_values)
    loaded.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "model").rglob("*"):
        if path.is_file() and path.name != "tokenizer_config.json":  # transformers notes where it was loaded from
            assert (tmp_path / "again" / path.relative_to(tmp_path / "model")).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize(("classes", "scale"), [({}, 1.0), (CLASSES, 2.0)], ids=["text", "text and class, guided"])
def test_an_image_depends_on_its_own_prompt_and_seed_alone(classes, scale):
    model = make_model("bert", **classes)
    labels = [0, 2, 1] if classes else None
    options = dict(negative_prompt="a sun", guidance_scale=scale)
    together = model.generate(labels, prompt=PROMPTS[:3], generator=[seeded(i) for i in range(3)], **options)
    for i, prompt in enumerate(PROMPTS[:3]):
        label = None if labels is None else [labels[i]]
        alone = model.generate(label, prompt=prompt, generator=seeded(i), **options)
        assert torch.equal(alone.codes[0], together.codes[i])
    repeated = model.generate(
        labels and labels[0], 2, prompt="a red heart", generator=[seeded(0), seeded(0)], **options
    )
    assert torch.equal(repeated.codes[0], repeated.codes[1]) and torch.equal(repeated.codes[0], together.codes[0])


def test_the_empty_prompt_is_no_prompt_and_the_hidden_half_of_guidance():
    model = make_model()
    none = model.generate(num_images=2, generator=seeded(0))
    for prompt in ("", ["", " "]):
        assert torch.equal(model.generate(None, 2, prompt=prompt, generator=seeded(0)).codes, none.codes)
    guided = model.generate(prompt="sun", guidance_scale=3.0, generator=seeded(1))
    explicit = model.generate(prompt="sun", negative_prompt="", guidance_scale=3.0, generator=seeded(1))
    other = model.generate(prompt="sun", negative_prompt="a red heart", guidance_scale=3.0, generator=seeded(1))
    assert torch.equal(guided.codes, explicit.codes) and not torch.equal(guided.codes, other.codes)


@pytest.mark.parametrize("kind", KINDS)
def test_training_reaches_the_text_encoder_and_losses_are_those_of_its_states(kind):
    model = make_model(kind, text_dropout=0.0)
    pixel_values = torch.rand(3, 3, 8, 8, generator=seeded(0)) * 2 - 1
    input_ids, mask = tokenize(model.tokenizer, PROMPTS[:3], LENGTH)
    output = model(pixel_values, input_ids=input_ids, attention_mask=mask)
    states, mask = encode_tokens(model.text_encoder, input_ids, mask)  # together, as in training
    given = model(pixel_values, encoder_hidden_states=states, encoder_attention_mask=mask)
    assert torch.equal(output.loss, given.loss) and not torch.equal(output.loss, model(pixel_values).loss)
    output.loss.backward()
    assert model.text_encoder.get_input_embeddings().weight.grad[4].abs().sum() > 0  # of "red"
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_a_mask_must_be_that_of_the_texts_that_are_given():
    model = make_model()
    pixel_values = torch.zeros(1, 3, 8, 8)
    input_ids, mask = tokenize(model.tokenizer, PROMPTS[:1], LENGTH)
    with pytest.raises(ValueError, match="that of input_ids is attention_mask"):
        model(pixel_values, input_ids=input_ids, encoder_attention_mask=mask)
    with pytest.raises(ValueError, match="attention_mask is of input_ids: give both"):
        model(pixel_values, attention_mask=mask)


def test_texts_for_a_model_without_them_are_refused():
    class_model = DQForImageGeneration.from_models(make_vae(), make_transformer(num_classes=3))
    with pytest.raises(ValueError, match=r"prompt is for a model with text; this one takes class_labels .* 0 ... 2"):
        class_model.generate(prompt="sun")
    with pytest.raises(ValueError, match="takes nothing to go by"):
        DQForImageGeneration.from_models(make_vae(), make_transformer()).generate(negative_prompt="sun")
    with pytest.raises(ValueError, match="takes a prompt: leave out class_labels"):
        make_model().generate([1])
    bare = DQForImageGeneration.from_models(make_vae(), make_transformer(**TEXT))
    with pytest.raises(ValueError, match="needs a text encoder and its tokenizer"):
        bare.generate(prompt="sun")
    states = torch.ones(1, 2, 8)
    assert bare.generate(encoder_hidden_states=states, generator=seeded(0)).codes.shape == (1, 8, 8)
    with pytest.raises(ValueError, match="a prompt or encoder_hidden_states, .*not both"):
        make_model().generate(prompt="sun", encoder_hidden_states=states)


def small(config_class, **sizes):
    return config_class(vocab_size=9, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, **sizes)


@pytest.mark.parametrize(
    ("encoder", "tokenizer", "error", "message"),
    [
        (lambda: AutoModel.from_config(small(BertConfig, hidden_size=16)), None, ValueError, "BertModel are 16 wide"),
        (
            lambda: AutoModel.from_config(small(BertConfig, hidden_size=8, max_position_embeddings=4)),
            None,
            ValueError,
            "at most 4 tokens, the generator's text_length is 5",
        ),
        (
            lambda: T5Model(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
            None,
            ValueError,
            "give the encoder alone",
        ),
        (torch.nn.Linear(1, 1), None, TypeError, "text_encoder must be a model of transformers, got Linear"),
        (None, make_text_tokenizer, ValueError, "a tokenizer needs its text encoder"),
        (make_text_encoder, lambda: "words", TypeError, "tokenizer must be one of transformers, got str"),
        (
            make_text_encoder,
            lambda: make_text_tokenizer((*WORDS, "moon")),
            ValueError,
            "10 tokens, the text encoder 9",
        ),
        (make_text_encoder, lambda: make_text_tokenizer(pad_token=None), ValueError, "no padding token"),
        (make_text_encoder, lambda: make_text_tokenizer(model_max_length=4), ValueError, "at most 4 tokens"),
    ],
)
def test_parts_that_do_not_fit_are_refused(encoder, tokenizer, error, message):
    encoder = encoder() if callable(encoder) and not isinstance(encoder, torch.nn.Module) else encoder
    with pytest.raises(error, match=message):
        DQForImageGeneration.from_models(
            make_vae(), make_transformer(**TEXT), encoder, None if tokenizer is None else tokenizer()
        )


def test_a_text_encoder_needs_a_generator_with_text():
    with pytest.raises(ValueError, match="trained without text"):
        DQForImageGeneration.from_models(make_vae(), make_transformer(), make_text_encoder())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    make_model("t5").save_pretrained(path)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved folder, to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


def test_damaged_text_encoders_are_refused_by_file_and_key(folder):
    path, key = folder / "text_encoder" / "model.safetensors", "encoder.final_layer_norm.weight"
    edit_weights(path, lambda weights: weights[key][:1].fill_(torch.nan))
    with pytest.raises(ValueError, match=rf"text_encoder/model.safetensors .*not finite.*{key}"):
        DQForImageGeneration.from_pretrained(folder)
    edit_weights(path, lambda weights: weights.pop(key))
    with pytest.raises(ValueError, match=rf"text_encoder/model.safetensors .*missing.*{key}"):
        DQForImageGeneration.from_pretrained(folder)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OSError, match="text_encoder/model.safetensors is damaged"):
        DQForImageGeneration.from_pretrained(folder)
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(OSError, match="has no folder text_encoder"):
        DQForImageGeneration.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(architectures=["T5Evil"]), "must be a class of transformers, got T5Evil"),
        (dict(architectures=["AutoModel"]), "must be a class of transformers, got AutoModel"),
        (dict(architectures=["BertModel"]), "BertModel has a BertConfig, got a T5Config"),
        (dict(model_type="evil"), "model_type of a model of transformers, got 'evil'"),
        (dict(d_model=16), "T5EncoderModel are 16 wide"),
        (dict(d_ff=16), "disagree on d_ff"),
    ],
)
def test_only_text_encoders_of_transformers_are_loaded(folder, changes, message):
    content = json.loads((folder / "config.json").read_text())
    content["text_encoder_config"] |= changes
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        DQForImageGeneration.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["whole CLIP", "CLIP with projection", "old BERT"])
def test_a_text_encoder_from_a_checkpoint_of_other_names_is_saved_with_its_own(kind, tmp_path):
    source, saved = tmp_path / "source", tmp_path / "saved"
    encoder = make_text_encoder("bert" if kind == "old BERT" else "clip")
    if kind == "whole CLIP":
        vision = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
        vision |= dict(image_size=8, patch_size=4)
        CLIPModel(CLIPConfig(text_config=encoder.config.to_dict(), vision_config=vision)).save_pretrained(source)
    elif kind == "CLIP with projection":
        CLIPTextModelWithProjection(encoder.config).save_pretrained(source)
    else:
        encoder.save_pretrained(source)
        with safe_open(source / "model.safetensors", "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
        for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
            weights = {name.replace(new, old): weight for name, weight in weights.items()}
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    encoder = type(encoder).from_pretrained(source)
    model = DQForImageGeneration.from_models(make_vae(), make_transformer(**TEXT), encoder, make_text_tokenizer())
    model.save_pretrained(saved)
    for loaded in (DQForImageGeneration.from_pretrained(saved), DQPipeline.from_pretrained(saved)):
        state = loaded.text_encoder.state_dict()
        assert state.keys() == encoder.state_dict().keys()
        assert all(torch.equal(state[name], weight) for name, weight in encoder.state_dict().items())


def test_a_text_encoder_that_takes_the_place_of_another_is_saved(tmp_path):
    model = DQForImageGeneration.from_models(
        make_vae(), make_transformer(**TEXT), make_text_encoder("clip"), make_text_tokenizer()
    )
    model.text_encoder = make_text_encoder("t5")
    model.text_encoder.config.architectures = ["T5ForConditionalGeneration"]  # of the checkpoint that it came from
    model.save_pretrained(tmp_path)
    loaded = DQForImageGeneration.from_pretrained(tmp_path)
    assert type(loaded.text_encoder).__name__ == "T5EncoderModel"


@pytest.mark.parametrize(
    "damaged", [b"", b"no tokenizer", b"{}", b'{"version": "1.0", "model": {"type": "none"}}', b"[" * 5000]
)
def test_a_damaged_tokenizer_is_refused_by_its_folder(folder, damaged):
    (folder / "tokenizer" / "tokenizer.json").write_bytes(damaged)
    with pytest.raises((OSError, ValueError), match=re.escape(str(folder / "tokenizer"))):
        DQForImageGeneration.from_pretrained(folder)


def test_code_beside_a_tokenizer_is_not_run(folder):
    file = folder / "tokenizer" / "tokenizer_config.json"
    content = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    content["tokenizer_class"] = "Evil"
    file.write_text(json.dumps(content))
    (folder / "tokenizer" / "evil.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match="trust_remote_code|Evil"):
        DQForImageGeneration.from_pretrained(folder)


def test_a_model_is_made_from_its_configuration_alone():
    encoder = AutoModelForTextEncoding.from_config(make_text_encoder("t5").config)
    config = make_model("t5").config
    assert type(DQForImageGeneration(DQConfig(**config.to_dict())).text_encoder) is type(encoder)
    for attention in ("eager", {"text_encoder_config": "eager"}):
        model = make_model("bert")
        model.set_attn_implementation(attention)
        assert model.text_encoder.config._attn_implementation == "eager"


def test_a_whole_clip_is_refused_with_what_to_give():
    sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    clip = CLIPModel(
        CLIPConfig(text_config=sizes | dict(vocab_size=9), vision_config=sizes | dict(image_size=8, patch_size=4))
    )
    with pytest.raises(ValueError, match="CLIPModel reads more than a text; give the encoder alone"):
        DQForImageGeneration.from_models(make_vae(), make_transformer(**TEXT), clip)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [None, "clip", "t5", "bert"])
@pytest.mark.parametrize("frozen", [False, True])
def test_distributed_training_needs_no_search_for_unused_weights(kind, frozen, one_process):
    if kind is None:
        model = DQForImageGeneration.from_models(make_vae(image_size=8), make_transformer(**SMALL, **CLASSES))
        inputs = dict(class_labels=[0, 1, 2])
    else:
        model = make_model(kind, text_dropout=0.5)
        model.text_encoder.requires_grad_(not frozen)
        inputs = dict(zip(("input_ids", "attention_mask"), tokenize(model.tokenizer, PROMPTS[:3], LENGTH)))
    codebook = model.vae.quantizer.codebook.clone()
    parallel = torch.nn.parallel.DistributedDataParallel(model.train())
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(parallel(torch.rand(3, 3, 8, 8, generator=seeded(0)) * 2 - 1, **inputs).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0] and torch.equal(model.vae.quantizer.codebook, codebook)


def test_adapters_of_the_whole_train_and_merge():
    model = make_model()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    before = model.generate(prompt="sun", generator=seeded(0)).codes
    input_ids, mask = tokenize(model.tokenizer, ["a red heart"], LENGTH)
    optimizer = torch.optim.SGD([each for each in adapted.parameters() if each.requires_grad], lr=20.0)
    for _ in range(3):
        adapted(torch.zeros(1, 3, 8, 8), input_ids=input_ids, attention_mask=mask).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    learnt = adapted.generate(prompt="sun", generator=seeded(0)).codes
    assert not torch.equal(learnt, before)
    with pytest.raises(ValueError, match="has an adapter: merge it first"):
        model.save_pretrained("nowhere")
    merged = adapted.merge_and_unload()
    assert type(merged) is DQForImageGeneration
    assert torch.equal(merged.generate(prompt="sun", generator=seeded(0)).codes, learnt)
