"""Tokenizer and generator together: joined without a change, saved as one folder, and refused where they do not fit."""

import copy
import re
import shutil

import pytest
import torch
from conftest import edit_config, make_transformer, make_vae
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

import dq_hf
from dq_hf.modeling.configuration_dq import DQConfig
from dq_hf.modeling.configuration_dqtransformer import DQTransformerConfig
from dq_hf.modeling.configuration_dqvae import DQVAEConfig
from dq_hf.modeling.modeling_dq import DQForImageGeneration

NAMES = {0: "sun", 1: "moon", 2: "star"}
LABELS = [2, 0, 1]
FILES = [
    "README.md",
    "config.json",
    "model_index.json",
    "preprocessor_config.json",
    "transformer/config.json",
    "transformer/model.safetensors",
    "vae/config.json",
    "vae/model.safetensors",
]


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


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def make_images():
    """Three images (3, 3, 16, 16) of noise in [-1, 1]."""
    return torch.rand(3, 3, 16, 16, generator=seeded(0)) * 2 - 1


def list_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def edit_weights(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("model_class", [DQForImageGeneration, AutoModel])
def test_a_saved_model_loads_with_the_same_weights_and_images(model, saved, model_class):
    loaded = model_class.from_pretrained(saved)
    assert type(loaded) is DQForImageGeneration and not loaded.training
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    before = model.generate(LABELS, generator=seeded(5))
    after = loaded.generate(LABELS, generator=seeded(5))
    assert torch.equal(before.codes, after.codes) and torch.equal(before.pixel_values, after.pixel_values)


def test_the_folder_holds_every_weight_once_and_no_path(model, saved):
    assert list_files(saved) == FILES
    weights = [load_file(saved / name / "model.safetensors") for name in ("vae", "transformer")]
    assert weights[0].keys() == model.vae.state_dict().keys()
    assert weights[1].keys() == model.transformer.state_dict().keys()


def test_a_loaded_model_is_saved_as_the_same_folder_without_a_trace_of_the_first(saved, tmp_path):
    DQForImageGeneration.from_pretrained(saved).save_pretrained(tmp_path / "again")
    assert list_files(tmp_path / "again") == FILES
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes(), name
        assert str(saved.parent).encode() not in (saved / name).read_bytes()


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


def test_a_card_that_is_there_is_kept(model, tmp_path):
    (tmp_path / "README.md").write_text("my card")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my card"


def test_other_processes_than_the_main_one_write_no_file(model, tmp_path):
    model.save_pretrained(tmp_path, is_main_process=False)
    assert list_files(tmp_path) == []


@pytest.mark.parametrize("argument", ["max_shards", "save_function", "repo_id", "token"])
def test_saving_refuses_unknown_arguments(model, tmp_path, argument):
    with pytest.raises(TypeError, match=argument):
        model.save_pretrained(tmp_path / "new", **{argument: "x"})
    assert not (tmp_path / "new").exists()


def test_weights_that_are_given_are_saved_if_they_are_all(model, tmp_path):
    state_dict = {key: value.clone().fill_(0.5) for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", state_dict=state_dict)
    loaded = DQForImageGeneration.from_pretrained(tmp_path / "given").state_dict()
    assert loaded.keys() == state_dict.keys() and all((value == 0.5).all() for value in loaded.values())
    del state_dict["vae.quantizer.codebook"]
    with pytest.raises(ValueError, match="1 are missing or left over: vae.quantizer.codebook"):
        model.save_pretrained(tmp_path / "new", state_dict=state_dict)
    assert not (tmp_path / "new").exists()


def test_saving_to_a_file_is_an_error(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


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


def test_generate_is_the_same_in_training_mode_and_leaves_it_on():
    model = make_model(dropout=0.5)
    expected = model.generate(LABELS, generator=seeded(3)).pixel_values
    assert torch.equal(model.train().generate(LABELS, generator=seeded(3)).pixel_values, expected)
    assert all(module.training for module in model.modules())


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
def test_joining_leaves_models_and_their_configurations_as_they_are(implementation):
    vae, transformer = make_vae(), make_transformer(num_classes=3)
    vae.set_attn_implementation(implementation)
    transformer.set_attn_implementation(implementation)
    codes = torch.randint(16, (1, 8, 8), generator=seeded(0))
    grain_map = torch.randint(2, (1, 4, 4), generator=seeded(1))
    configs = [copy.deepcopy(part.config.to_dict()) for part in (vae, transformer)]
    with torch.no_grad():
        logits, images = transformer(codes, grain_map, [1]).content_logits, vae.decode_codes(codes).sample
        model = DQForImageGeneration.from_models(vae, transformer)
        assert torch.equal(transformer(codes, grain_map, [1]).content_logits, logits)
        assert torch.equal(vae.decode_codes(codes).sample, images)

        # Still causal: the last code of the stream has no influence on what comes before it.
        end = int((4**grain_map).sum()) + 2
        output = transformer(codes, grain_map, [1])
        last = output.stream.positions[0, end]  # a fine cell
        codes.view(-1)[last] = (codes.view(-1)[last] + 1) % 16
        changed = transformer(codes, grain_map, [1])
        assert torch.equal(changed.content_logits[0, : end - 1], logits[0, : end - 1])
        assert not torch.equal(changed.content_logits[0, end:], logits[0, end:])
    assert model.vae is vae and model.transformer is transformer
    assert [part.config.to_dict() for part in (vae, transformer)] == configs
    assert vae.config._attn_implementation == transformer.config._attn_implementation == implementation


def test_joining_does_not_initialise_layers_that_were_put_in():
    vae, transformer = make_vae(), make_transformer()
    vae.decoder.conv_in = torch.nn.Conv2d(8, 8, 3, padding=1)
    transformer.content_head.projection = torch.nn.Linear(16, 19, bias=False)
    expected = vae.decoder.conv_in.weight.clone(), transformer.content_head.projection.weight.clone()
    model = DQForImageGeneration.from_models(vae, transformer)
    assert torch.equal(model.vae.decoder.conv_in.weight, expected[0])
    assert torch.equal(model.transformer.content_head.projection.weight, expected[1])


def test_joining_and_saving_draw_no_random_number(tmp_path):
    vae, transformer = make_vae(), make_transformer()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    DQForImageGeneration.from_models(vae, transformer).save_pretrained(tmp_path)
    assert torch.equal(torch.rand(3), expected)


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


def test_parts_in_the_wrong_place_are_refused():
    with pytest.raises(TypeError, match="vae_config must be a DQVAEConfig or a dictionary, got DQTransformerConfig"):
        DQForImageGeneration.from_models(make_transformer(), make_vae())


def test_a_configuration_fills_what_it_is_not_given_and_copies_what_it_is():
    vae_config = DQVAEConfig(image_size=[32, 64], codebook_size=20)
    vae_config._attn_implementation = "eager"
    before = copy.deepcopy(vae_config.to_dict())
    config = DQConfig(vae_config=vae_config)
    assert config.transformer_config.grid_sizes == [[2, 4], [4, 8]]
    assert config.transformer_config.codebook_size == 20
    config.vae_config.codebook_weight = 3.0
    assert vae_config.to_dict() == before and vae_config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(vae_confg=None), "no field 'vae_confg'; did you mean 'vae_config'"),
        (dict(vae_config=dict(codebok_size=3)), "no field 'codebok_size'; did you mean 'codebook_size'"),
        (dict(transformer_config=dict(num_classes=1), id2label={0: "sun"}), "transformer_config"),
    ],
)
def test_configurations_refuse_typos_and_names_in_the_wrong_place(arguments, message):
    with pytest.raises(ValueError, match=message):
        DQConfig(**arguments)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("vae", "codebook_decay", 0.5),
        ("vae", "entropy_thresholds", [1.25]),
        ("transformer", "fine_order", "region-first"),
        ("transformer", "attention_dropout", 0.0),
    ],
)
def test_configurations_that_disagree_are_refused_by_field(folder, part, field, value):
    edit_config(folder / part / "config.json", **{field: value})
    with pytest.raises(ValueError, match=rf"config.json and {part}/config.json disagree on {field}$"):
        DQForImageGeneration.from_pretrained(folder)


def test_class_names_that_disagree_are_refused(folder):
    edit_config(folder / "transformer" / "config.json", id2label={0: "sun", 1: "moon", 2: "comet"}, label2id=None)
    with pytest.raises(ValueError, match="transformer/config.json disagree on id2label"):
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


def test_a_missing_root_configuration_is_named(folder):
    (folder / "config.json").unlink()
    with pytest.raises(OSError, match=f"{folder} has no config.json"):
        DQForImageGeneration.from_pretrained(folder)


@pytest.mark.parametrize(
    ("part", "key"), [("vae", "decoder.conv_in.weight"), ("transformer", "content_embedding.weight")]
)
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda weights, key: weights.pop(key), "missing"),
        (lambda weights, key: weights[key].view(-1)[:1].fill_(torch.nan), "not finite"),
        (lambda weights, key: weights.update({key: weights[key][:2].clone()}), "another shape"),
        (lambda weights, key: weights.update({key + "2": weights[key].clone()}), "does not have"),
    ],
)
def test_bad_weights_are_refused_by_file_and_key(folder, part, key, change, problem):
    path = folder / part / "model.safetensors"
    edit_weights(path, lambda weights: change(weights, key))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} .*{problem}.*{key}"):
        DQForImageGeneration.from_pretrained(folder)


@pytest.mark.parametrize("part", ["vae", "transformer"])
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_truncated_file_is_refused_by_name(folder, part, share):
    path = folder / part / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(OSError, match=re.escape(str(path))):
        DQForImageGeneration.from_pretrained(folder)


@pytest.mark.parametrize("model_class", [DQForImageGeneration, AutoModel])
def test_loading_refuses_unknown_arguments(saved, model_class):
    with pytest.raises((TypeError, ValueError), match="atn_implementation"):
        model_class.from_pretrained(saved, atn_implementation="eager")


@pytest.mark.parametrize("model_class", [DQForImageGeneration, AutoModel])
@pytest.mark.parametrize("attention", ["eager", {"transformer_config": "eager"}])
def test_dtype_and_attention_can_be_chosen_at_loading(saved, model_class, attention):
    model = model_class.from_pretrained(saved, dtype=torch.bfloat16, attn_implementation=attention)
    assert model.transformer.content_head.projection.weight.dtype == torch.bfloat16
    assert model.vae.decoder.conv_in.weight.dtype == torch.bfloat16
    assert model.vae.quantizer.codebook.dtype == torch.float32
    assert model.transformer.config._attn_implementation == "eager"
    assert model.generate(LABELS, generator=seeded(0)).pixel_values.isfinite().all()


@pytest.mark.parametrize("model_class", [DQForImageGeneration, AutoModel])
def test_weights_stored_in_half_precision_are_computed_in_the_configurations_dtype(folder, model_class):
    for part in ("vae", "transformer"):
        path = folder / part / "model.safetensors"
        edit_weights(path, lambda weights: weights.update({key: value.bfloat16() for key, value in weights.items()}))
    model = model_class.from_pretrained(folder)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_a_model_in_a_subfolder_is_loaded(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "a" / "b")
    model = DQForImageGeneration.from_pretrained(tmp_path, subfolder="a/b")
    assert model.config.id2label == NAMES


def test_loading_info_is_given_for_each_part(saved):
    model, info = DQForImageGeneration.from_pretrained(saved, output_loading_info=True)
    assert isinstance(model, DQForImageGeneration)
    assert set(info) == {"vae", "transformer"} and not info["vae"]["missing_keys"]


def test_public_names_are_there():
    assert set(dq_hf.__all__) <= set(dir(dq_hf))
