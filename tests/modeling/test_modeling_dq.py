"""Tokenizer and generator together: joined without a change, saved as one folder, and refused where they do not fit."""

import copy
import re
import shutil

import pytest
import torch
from conftest import edit_config, edit_weights, make_transformer, make_vae, seeded
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from dq_hf.modeling.configuration_dq import DQConfig
from dq_hf.modeling.configuration_dqtransformer import DQTransformerConfig
from dq_hf.modeling.configuration_dqvae import DQVAEConfig
from dq_hf.modeling.modeling_dq import DQForImageGeneration

NAMES = {0: "sun", 1: "moon", 2: "star"}
LABELS = [2, 0, 1]


def make_model(**vae_overrides):
    """Of three classes, with a hidden one."""
    transformer = make_transformer(num_classes=3, id2label=NAMES, class_dropout=0.2)
    return DQForImageGeneration.from_models(make_vae(**vae_overrides), transformer).eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(path)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved folder, to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


def make_images():
    """Three images (3, 3, 16, 16) of noise in [-1, 1]."""
    return torch.rand(3, 3, 16, 16, generator=seeded(0)) * 2 - 1


@pytest.mark.parametrize("model_class", [DQForImageGeneration, AutoModel])
def test_a_saved_model_loads_with_the_same_weights_and_images(model, saved, model_class):
    loaded, info = model_class.from_pretrained(saved.parent, subfolder="model", output_loading_info=True)
    assert type(loaded) is DQForImageGeneration and not loaded.training
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(info) and not any(info.values())
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    before = model.generate(LABELS, generator=seeded(5))
    after = loaded.generate(LABELS, generator=seeded(5))
    assert torch.equal(before.codes, after.codes) and torch.equal(before.pixel_values, after.pixel_values)


def save_again(model, folder):
    """What `AutoModel` loads of a saved model."""
    model.save_pretrained(folder)
    return AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("names_of", [lambda model: model.config, lambda model: model.transformer.config])
def test_classes_that_are_renamed_are_saved_wherever_they_were(folder, names_of):
    model = AutoModel.from_pretrained(folder)
    names_of(model).id2label = {0: "cat", 1: "dog", 2: "cow"}
    names_of(model).label2id = {"cat": 0, "dog": 1, "cow": 2}
    loaded = save_again(model, folder)
    for config in (loaded.config, loaded.transformer.config):
        assert config.id2label == {0: "cat", 1: "dog", 2: "cow"} and config.label2id == {"cat": 0, "dog": 1, "cow": 2}


def test_a_class_that_is_renamed_in_place_is_saved(folder):
    model = AutoModel.from_pretrained(folder)
    names = model.config
    names.id2label[0] = "cat"
    del names.label2id["sun"]
    names.label2id["cat"] = 0
    assert save_again(model, folder).transformer.config.id2label == NAMES | {0: "cat"}


def test_half_renamed_classes_are_refused_and_the_folder_stays(folder):
    model = AutoModel.from_pretrained(folder)
    model.config.id2label = {0: "cat", 1: "dog", 2: "cow"}
    with pytest.raises(ValueError, match="label2id must be the inverse of id2label"):
        model.save_pretrained(folder)
    assert AutoModel.from_pretrained(folder).config.id2label == NAMES


def test_a_part_that_is_replaced_is_saved_with_its_configuration(folder):
    model = AutoModel.from_pretrained(folder)
    model.vae = make_vae(commitment_beta=0.5)
    model.transformer = make_transformer(num_classes=3, id2label={0: "a", 1: "b", 2: "c"}, residual_dropout=0.3)
    loaded = save_again(model, folder)
    assert loaded.config.vae_config.commitment_beta == 0.5
    assert loaded.config.transformer_config.residual_dropout == 0.3
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    model.vae = make_vae(codebook_size=8)
    with pytest.raises(ValueError, match="tokenizer's codebook_size is 8, the generator's 16"):
        model.save_pretrained(folder)


def test_class_names_as_an_argument_are_refused_with_the_way_to_set_them(folder):
    with pytest.raises(ValueError, match="disagree on id2label.*set it on the configuration of the loaded model"):
        DQForImageGeneration.from_pretrained(folder, id2label={0: "cat", 1: "dog", 2: "cow"})


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_a_compiled_part_is_saved_as_if_it_were_not(model, folder, part):
    compiled = AutoModel.from_pretrained(folder)
    setattr(compiled, part, torch.compile(getattr(compiled, part)))
    for weights in (None, compiled.state_dict()):
        compiled.save_pretrained(folder, state_dict=weights)
        loaded = AutoModel.from_pretrained(folder).state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in model.state_dict().items())


def test_the_folder_holds_every_weight_once(model, saved):
    for part in ("vae", "transformer"):
        weights = load_file(saved / part / "model.safetensors")
        assert weights.keys() == getattr(model, part).state_dict().keys()


def test_a_model_saved_in_pieces_or_as_a_variant_loads_again(model, tmp_path):
    model.save_pretrained(tmp_path / "pieces", max_shard_size="20KB")
    assert len(list((tmp_path / "pieces" / "vae").glob("*.safetensors"))) > 1
    model.save_pretrained(tmp_path / "variant", variant="small")
    for name, options in (("pieces", {}), ("variant", {"variant": "small"})):
        loaded = DQForImageGeneration.from_pretrained(tmp_path / name, **options)
        assert torch.equal(loaded.vae.quantizer.codebook, model.vae.quantizer.codebook)


def test_auto_classes_give_configuration_and_image_processor(saved):
    config = AutoConfig.from_pretrained(saved)
    assert type(config) is DQConfig and config.id2label == NAMES
    assert type(config.vae_config) is DQVAEConfig and config.vae_config.granularities == [4, 2]
    assert type(config.transformer_config) is DQTransformerConfig and config.transformer_config.num_classes == 3
    assert AutoImageProcessor.from_pretrained(saved).size == {"height": 16, "width": 16}


def test_a_card_that_is_there_is_kept_and_other_processes_write_nothing(model, tmp_path):
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    (tmp_path / "README.md").write_text("my card")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my card"
    with pytest.raises(OSError, match="README.md"):
        model.save_pretrained(tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == "my card"


@pytest.mark.parametrize("argument", ["max_shards", "repo_id", "token"])
def test_saving_and_loading_refuse_unknown_arguments(model, saved, tmp_path, argument):
    with pytest.raises(TypeError, match=argument):
        model.save_pretrained(tmp_path / "new", **{argument: "x"})
    assert not (tmp_path / "new").exists()
    for model_class in (DQForImageGeneration, AutoModel):
        with pytest.raises((TypeError, ValueError), match="atn_implementation"):
            model_class.from_pretrained(saved, atn_implementation="eager")


def test_weights_that_are_given_are_saved_if_they_are_all(model, tmp_path):
    state_dict = {key: value.clone().fill_(0.5) for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", state_dict=state_dict)
    loaded = DQForImageGeneration.from_pretrained(tmp_path / "given").state_dict()
    assert loaded.keys() == state_dict.keys() and all((value == 0.5).all() for value in loaded.values())
    del state_dict["vae.quantizer.codebook"]
    with pytest.raises(ValueError, match="1 are missing or left over: vae.quantizer.codebook"):
        model.save_pretrained(tmp_path / "new", state_dict=state_dict)
    assert not (tmp_path / "new").exists()


def test_generate_is_the_generators_codes_decoded(model):
    options = dict(temperature=0.9, top_k=5, fine_positions="free")
    generated = model.generate(LABELS, generator=seeded(3), **options)
    expected = model.transformer.generate(LABELS, generator=seeded(3), **options)
    assert torch.equal(generated.codes, expected.codes) and torch.equal(generated.grain_map, expected.grain_map)
    assert torch.equal(generated.lengths, expected.lengths)
    with torch.no_grad():
        torch.testing.assert_close(
            generated.pixel_values, model.vae.decode_codes(expected.codes).sample, rtol=0, atol=1e-5
        )
    assert generated.pixel_values.shape == (3, 3, 16, 16) and not generated.pixel_values.requires_grad
    in_training = make_model(dropout=0.5).train()
    assert torch.equal(
        in_training.generate(LABELS, generator=seeded(3), **options).pixel_values, generated.pixel_values
    )
    assert all(module.training for module in in_training.modules())


def test_forward_trains_the_generator_on_the_images_codes():
    model = make_model().train()
    model.transformer.eval()
    codebook = model.vae.quantizer.codebook.clone()
    output = model(make_images(), class_labels=LABELS)
    output.loss.backward()
    assert torch.equal(model.vae.quantizer.codebook, codebook)
    assert all(parameter.grad is None for parameter in model.vae.parameters())
    assert model.transformer.content_head.projection.weight.grad.abs().sum() > 0

    vae = make_vae()
    with torch.no_grad():
        encoded = vae.encode(make_images())
        expected = model.transformer(encoded.codes, encoded.grain_map, LABELS)
    assert output.loss.item() == pytest.approx(expected.loss.item())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_joining_leaves_models_their_configurations_and_the_random_numbers_as_they_are(implementation, tmp_path):
    vae, transformer = make_vae(), make_transformer(num_classes=3)
    transformer.content_head.projection = torch.nn.Linear(16, 21, bias=False)  # a layer that was put in
    for part in (vae, transformer):
        part.set_attn_implementation(implementation)
    codes = torch.randint(16, (1, 8, 8), generator=seeded(0))
    grain_map = torch.ones(1, 4, 4).long()
    configs = [copy.deepcopy(part.config.to_dict()) for part in (vae, transformer)]
    with torch.no_grad():
        logits, images = transformer(codes, grain_map, [1]).content_logits, vae.decode_codes(codes).sample
        torch.manual_seed(0)
        before = torch.get_rng_state()
        model = DQForImageGeneration.from_models(vae, transformer)
        assert torch.equal(transformer(codes, grain_map, [1]).content_logits, logits)
        assert torch.equal(vae.decode_codes(codes).sample, images)
    assert model.vae is vae and model.transformer is transformer
    assert [part.config.to_dict() for part in (vae, transformer)] == configs
    assert vae.config._attn_implementation == transformer.config._attn_implementation == implementation
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(codebook_size=8), "tokenizer's codebook_size is 16, the generator's 8"),
        (dict(grid_sizes=[[2, 2], [4, 4]]), r"grid_sizes is \[\[4, 4\], \[8, 8\]\], the generator's \[\[2, 2\]"),
        (dict(grid_sizes=[[8, 8]]), "do not fit"),
    ],
)
def test_parts_that_do_not_fit_are_refused(overrides, message):
    vae, transformer = make_vae(), make_transformer(**overrides)
    with pytest.raises(ValueError, match=message):
        DQForImageGeneration.from_models(vae, transformer)
    with pytest.raises(ValueError, match=message):
        DQConfig(vae_config=vae.config, transformer_config=transformer.config)
    with pytest.raises(ValueError, match=message):
        DQConfig(vae_config=vae.config.to_dict(), transformer_config=transformer.config.to_dict())
    with pytest.raises(TypeError, match="vae_config must be a DQVAEConfig or a dictionary, got DQTransformerConfig"):
        DQForImageGeneration.from_models(transformer, vae)


def test_a_configuration_fills_what_it_is_not_given_copies_what_it_is_and_refuses_typos():
    vae_config = DQVAEConfig(image_size=[32, 64], codebook_size=20)
    vae_config._attn_implementation = "eager"
    before = copy.deepcopy(vae_config.to_dict())
    config = DQConfig(vae_config=vae_config)
    assert config.transformer_config.grid_sizes == [[2, 4], [4, 8]]
    assert config.transformer_config.codebook_size == 20
    config.vae_config.codebook_weight = 3.0
    assert vae_config.to_dict() == before and vae_config._attn_implementation == "eager"
    for arguments, message in (
        (dict(vae_confg=None), "no field 'vae_confg'; did you mean 'vae_config'"),
        (dict(vae_config=dict(codebok_size=3)), "no field 'codebok_size'; did you mean 'codebook_size'"),
        (dict(transformer_config=dict(num_classes=1), id2label={0: "sun"}), "transformer_config"),
    ):
        with pytest.raises(ValueError, match=message):
            DQConfig(**arguments)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("vae", "codebook_decay", 0.5),
        ("transformer", "fine_order", "region-first"),
        ("transformer", "attention_dropout", 0.0),
        ("transformer", "id2label", {0: "sun", 1: "moon", 2: "comet"}),
    ],
)
def test_configurations_that_disagree_are_refused_by_field(folder, part, field, value):
    names = {"label2id": None} if field == "id2label" else {}
    edit_config(folder / part / "config.json", **{field: value}, **names)
    with pytest.raises(ValueError, match=rf"config.json and {part}/config.json disagree on {field};"):
        DQForImageGeneration.from_pretrained(folder)


@pytest.mark.parametrize("part", ["vae", "transformer"])
@pytest.mark.parametrize("name", ["", "config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, part, name):
    path = folder / part / name
    path.unlink() if name else shutil.rmtree(path)
    with pytest.raises(OSError) as error:
        DQForImageGeneration.from_pretrained(folder)
    expected = [f"{folder}/{part}", name] if name else [f"{folder} has no folder {part}"]
    assert all(text in str(error.value) for text in expected)
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match=f"{folder} has no config.json"):
        DQForImageGeneration.from_pretrained(folder)


@pytest.mark.parametrize(
    ("part", "key"), [("vae", "decoder.conv_in.weight"), ("transformer", "content_embedding.weight")]
)
def test_bad_weights_are_refused_by_file_and_key(folder, part, key):
    path = folder / part / "model.safetensors"
    edit_weights(path, lambda weights: weights[key].view(-1)[:1].fill_(torch.nan))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} .*not finite.*{key}"):
        DQForImageGeneration.from_pretrained(folder)
    edit_weights(path, lambda weights: weights.pop(key))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} .*missing.*{key}"):
        DQForImageGeneration.from_pretrained(folder)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OSError, match=re.escape(str(path))):
        DQForImageGeneration.from_pretrained(folder)


@pytest.mark.parametrize("model_class", [DQForImageGeneration, AutoModel])
@pytest.mark.parametrize("attention", ["eager", {"transformer_config": "eager"}])
def test_dtype_and_attention_can_be_chosen_at_loading(saved, model_class, attention):
    model = model_class.from_pretrained(saved, dtype=torch.bfloat16, attn_implementation=attention)
    assert model.transformer.content_head.projection.weight.dtype == torch.bfloat16
    assert model.vae.decoder.conv_in.weight.dtype == torch.bfloat16
    assert model.vae.quantizer.codebook.dtype == torch.float32
    assert model.transformer.config._attn_implementation == "eager"
    assert model.generate(LABELS, generator=seeded(0)).pixel_values.isfinite().all()
