"""Prompts through DQPipeline: as in diffusers, the same images as the model's own; other inputs are refused."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import cpu_offload
from conftest import (
    TEXT,
    edit_config,
    edit_weights,
    make_text_encoder,
    make_text_tokenizer,
    make_transformer,
    make_vae,
    seeded,
)
from diffusers import DiffusionPipeline
from diffusers.callbacks import PipelineCallback
from transformers import BertForMaskedLM, pipeline

from dq_hf import DQForImageGeneration, DQPipeline
from dq_hf.modeling.text_dq import encode_tokens

CLASSES = dict(num_classes=3, id2label={0: "sun", 1: "moon", 2: "star"}, class_dropout=0.2)
SMALL = dict(grid_sizes=[[2, 2], [4, 4]])


def make_model(kind="clip", **overrides):
    """For 8x8 images, with a text encoder of a kind."""
    parts = make_vae(image_size=8), make_transformer(**TEXT, **SMALL, **overrides)
    return DQForImageGeneration.from_models(*parts, make_text_encoder(kind), make_text_tokenizer()).eval()


def pipeline_of(model):
    pipe = DQPipeline(**model.parts, tokenizer=model.tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def pipe(model):
    return pipeline_of(model)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(path)
    return path


def test_a_seed_is_the_models_own_image_however_it_is_asked_for(model, pipe, folder):
    options = dict(guidance_scale=2.0, temperature=0.9)
    expected = model.generate(prompt=["sun", "a red heart"], negative_prompt="blue", generator=seeded(3), **options)
    for each in (pipe, DQPipeline.from_pretrained(folder), DiffusionPipeline.from_pretrained(folder)):
        each.set_progress_bar_config(disable=True)
        output = each(["sun", "a red heart"], negative_prompt="blue", generator=seeded(3), **options)
        assert torch.equal(output.codes, expected.codes)
    texts = pipe.encode_prompt(["sun", "a red heart"], "blue")
    embeds = dict(
        prompt_embeds=texts["encoder_hidden_states"],
        prompt_attention_mask=texts["encoder_attention_mask"],
        negative_prompt_embeds=texts["negative_encoder_hidden_states"],
        negative_prompt_attention_mask=texts["negative_encoder_attention_mask"],
    )
    bare = DQPipeline(pipe.vae, pipe.transformer)
    assert torch.equal(bare(**embeds, generator=seeded(3), **options).codes, expected.codes)
    saved = bare.save_pretrained(folder.parent / "bare")
    assert saved is None and not (folder.parent / "bare" / "text_encoder").exists()
    assert DQPipeline.from_pretrained(folder.parent / "bare").text_encoder is None


@pytest.mark.parametrize("classes", [{}, CLASSES], ids=["text", "text and class"])
def test_images_of_each_prompt_come_one_after_the_other(classes):
    pipe = pipeline_of(make_model(**classes))
    labels = dict(class_labels=["moon", "star"]) if classes else {}
    output = pipe(["sun", "heart"], num_images_per_prompt=2, generator=seeded(1), output_type="codes", **labels)
    labels = dict(class_labels=[1, 1, 2, 2]) if classes else {}
    prompts = ["sun", "sun", "heart", "heart"]
    assert torch.equal(output.codes, pipe(prompts, generator=seeded(1), output_type="codes", **labels).codes)
    labels = dict(class_labels="moon", num_images_per_label=2) if classes else dict(num_images_per_prompt=2)
    none = pipe(generator=seeded(1), output_type="codes", **labels)
    empty = pipe(["", " "], generator=seeded(1), output_type="codes", **(classes and dict(class_labels=[1])))
    assert torch.equal(none.codes, empty.codes) and len(none.codes) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(prompt=[]), ValueError, "prompt must hold at least one text"),
        (dict(prompt=7), TypeError, "prompt must be a text or a list of texts, got int"),
        (dict(negative_prompt=["sun", None]), TypeError, "negative_prompt .* got None in it"),
        (
            dict(prompt=["sun", "sun"], negative_prompt=["a"] * 3),
            ValueError,
            "must be one, or as many; got 2 of .*3 of",
        ),
        (dict(prompt="sun", prompt_embeds=torch.ones(1, 2, 8)), ValueError, "prompt or prompt_embeds, not both"),
        (dict(prompt_attention_mask=torch.ones(1, 2)), ValueError, "prompt_attention_mask is of prompt_embeds"),
        (dict(prompt_embeds=torch.ones(1, 2, 9)), ValueError, r"^prompt_embeds must have shape \(B, T, 8\)"),
        (dict(prompt_embeds=torch.full((1, 2, 8), torch.nan)), ValueError, "must be finite"),
        (dict(prompt="sun", negative_prompt_embeds=torch.full((1, 2, 8), torch.inf)), ValueError, "must be finite"),
        (dict(prompt_embeds=torch.ones(1, 2, 8).int()), TypeError, "prompt_embeds must be a float tensor"),
        (
            dict(negative_prompt_embeds=torch.ones(1, 2, 8), negative_prompt_attention_mask=torch.ones(2, 2)),
            ValueError,
            "negative_prompt_attention_mask must have shape",
        ),
        (dict(negative_promt="a"), TypeError, "did you mean negative_prompt?"),
        (dict(encoder_hidden_states=torch.ones(1, 2, 8)), TypeError, "here it is prompt_embeds"),
        (dict(negative_encoder_attention_mask=0), TypeError, "here it is negative_prompt_attention_mask"),
        (dict(class_labels=1), ValueError, "takes a prompt: it has no classes"),
        (dict(num_images_per_prompt=0), ValueError, "num_images_per_prompt must be at least 1"),
        (dict(num_images_per_prompt=2, num_images_per_label=3), ValueError, "one number, got 2 and 3"),
    ],
)
def test_bad_inputs_are_refused(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        pipe(**arguments)


def test_what_is_hidden_by_the_mask_may_be_anything(pipe):
    states = torch.ones(1, 2, 8)
    mask = torch.tensor([[1, 0]])
    expected = pipe(prompt_embeds=states, prompt_attention_mask=mask, generator=seeded()).codes
    states[:, 1] = torch.nan
    assert torch.equal(pipe(prompt_embeds=states, prompt_attention_mask=mask, generator=seeded()).codes, expected)


def test_one_class_is_that_of_all_prompts():
    model = make_model(**CLASSES)
    prompts = ["sun", "a red heart"]
    expected = model.generate([1, 1], prompt=prompts, generator=seeded()).codes
    assert torch.equal(model.generate(1, prompt=prompts, generator=seeded()).codes, expected)
    with pytest.raises(ValueError, match="^negative_encoder_hidden_states must be of one .* of 3 images, got 2"):
        model.generate(0, 3, prompt="sun", negative_prompt=prompts, guidance_scale=2.0)
    with pytest.raises(TypeError, match="did you mean negative_prompt?"):
        model.generate(0, prompt="sun", negative_promt=prompts)


def test_the_task_takes_what_other_models_are_loaded_with(model, tmp_path):
    model.save_pretrained(tmp_path, variant="fp16")
    task = pipeline("dq-generation", model=str(tmp_path), model_kwargs=dict(variant="fp16", use_safetensors=True))
    expected = pipeline("dq-generation", model=model)("sun", seed=0)
    assert torch.equal(torch.as_tensor(task("sun", seed=0)["codes"]), torch.as_tensor(expected["codes"]))
    with pytest.raises(ValueError, match="no field 'varient'"):
        pipeline("dq-generation", model=str(tmp_path), model_kwargs=dict(varient="fp16"))


def test_an_encoder_with_another_output_says_what_to_give(model):
    encoder = BertForMaskedLM(make_text_encoder("bert").config)
    with pytest.raises(ValueError, match="BertForMaskedLM gives no states of a text; give the encoder alone"):
        encode_tokens(encoder, torch.ones(1, 2, dtype=torch.long))


def test_a_model_without_text_says_what_it_takes():
    parts = make_vae(image_size=8), make_transformer(**SMALL, **CLASSES)
    for arguments in (dict(prompt="sun"), dict(negative_prompt="sun"), dict(prompt_embeds=torch.ones(1, 2, 8))):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} is for .*takes class_labels"):
            DQPipeline(*parts)(**arguments)
    with pytest.raises(ValueError, match="needs a text encoder and its tokenizer"):
        DQPipeline(make_vae(image_size=8), make_transformer(**TEXT, **SMALL))("sun")


def test_every_door_saves_the_same_folder(pipe, folder, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe" / "model")
    DQPipeline.from_pretrained(folder).save_pretrained(tmp_path / "again" / "model", safe_serialization=True)
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "tokenizer_config.json":  # transformers notes where it was loaded from
            for name in ("pipe", "again"):
                assert (tmp_path / name / "model" / path.relative_to(folder)).read_bytes() == path.read_bytes(), path


def test_a_damaged_text_encoder_is_refused_by_file_and_key(model, tmp_path):
    model.save_pretrained(tmp_path)
    path, key = tmp_path / "text_encoder" / "model.safetensors", "final_layer_norm.weight"
    edit_weights(path, lambda weights: weights[key].fill_(torch.inf))
    with pytest.raises(ValueError, match=f"text_encoder/model.safetensors .*not finite: {key}"):
        DQPipeline.from_pretrained(tmp_path)
    edit_weights(path, lambda weights: weights.pop(key))
    with pytest.raises(ValueError, match=f"text_encoder/model.safetensors .*missing: {key}"):
        DQPipeline.from_pretrained(tmp_path)
    assert DQPipeline.from_pretrained(tmp_path, text_encoder=model.text_encoder).text_encoder is model.text_encoder
    for changes, message in (
        ({"text_encoder": ["transformers", "BertModel"]}, "text_encoder must be CLIPTextModel, .*got BertModel"),
        ({"tokenizer": ["antigravity", "fly"]}, "tokenizer must be a class of transformers, got .*antigravity"),
        ({"text_encoder": []}, "text_encoder must be a class of transformers"),
        ({"text_encodr": ["transformers", "x"]}, "unknown entries text_encodr"),
    ):
        edit_config(tmp_path / "model_index.json", **changes)
        with pytest.raises(ValueError, match=message):
            DQPipeline.from_pretrained(tmp_path)
        model.save_pretrained(tmp_path)


class Watch(PipelineCallback):
    tensor_inputs = ["lengths"]

    def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
        pipeline._interrupt = step_index == 1
        self.seen = [*getattr(self, "seen", []), set(callback_kwargs)]
        return callback_kwargs


def test_callbacks_of_diffusers_and_the_guidance_scale(pipe):
    watch = Watch()
    stopped = pipe("sun", generator=seeded(0), output_type="codes", callback_on_step_end=watch)
    assert watch.seen == [{"lengths"}] * 2 and (stopped.codes == -1).any()
    pipe("sun", output_type="codes")
    assert pipe.guidance_scale == 1.0 and not pipe.do_classifier_free_guidance

    def change(pipe, step, timestep, tensors):
        pipe._guidance_scale = 5.0

    with pytest.raises(ValueError, match="cannot change guidance_scale on the way"):
        pipe("sun", guidance_scale=2.0, output_type="codes", callback_on_step_end=change)


def test_components_are_those_of_diffusers(pipe):
    assert set(pipe.components) == {"vae", "transformer", "text_encoder", "tokenizer"}
    assert DQPipeline.from_pipe(pipe).text_encoder is pipe.text_encoder
    half = DQPipeline(**pipe.components).to(torch.float32)
    assert half("sun", output_type="np").images.shape == (1, 8, 8, 3)


def test_compiled_components_are_saved_as_if_they_were_not(folder, tmp_path):
    pipe = DQPipeline.from_pretrained(folder)
    for name in ("vae", "transformer", "text_encoder"):
        setattr(pipe, name, torch.compile(getattr(pipe, name)))
    pipe.save_pretrained(tmp_path / "saved")
    loaded, expected = (DQForImageGeneration.from_pretrained(place) for place in (tmp_path / "saved", folder))
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert DQPipeline.from_pipe(pipe).text_encoder is pipe.text_encoder


def test_states_of_texts_need_no_text_encoder_and_saving_says_what_it_would_lose(pipe, folder, tmp_path):
    states = pipe.encode_prompt("a red sun")
    expected = pipe("a red sun", generator=seeded(0), output_type="codes").codes
    given = dict(prompt_embeds=states["encoder_hidden_states"], prompt_attention_mask=states["encoder_attention_mask"])
    for light in (
        DQPipeline.from_pretrained(folder, text_encoder=None),
        DQPipeline.from_pipe(pipe, text_encoder=None),
    ):
        assert torch.equal(light(**given, generator=seeded(0), output_type="codes").codes, expected)
        with pytest.raises(ValueError, match="needs its text encoder: give text_encoder, too, or tokenizer=None"):
            light.save_pretrained(tmp_path / "light")
        light.tokenizer = None
        light.save_pretrained(tmp_path / "light")
        assert DQPipeline.from_pretrained(tmp_path / "light").tokenizer is None


def test_a_pipeline_without_its_models_is_refused(folder):
    with pytest.raises(TypeError, match="needs the tokenizer and the generator"):
        DQPipeline.from_pretrained(folder, vae=None, transformer=None)


def test_text_models_may_be_offloaded_in_whole_or_in_small_pieces(model, folder, tmp_path):
    expected = model.generate(prompt="a red sun", generator=seeded(0)).codes
    options = dict(device_map="auto", max_memory={"cpu": "1KB"}, offload_folder=tmp_path)
    on_disk = DQForImageGeneration.from_pretrained(folder, **options)
    assert all(parameter.is_meta for parameter in on_disk.transformer.text_prefix.parameters())
    assert torch.equal(on_disk.generate(prompt="a red sun", generator=seeded(0)).codes, expected)

    pipe = DQPipeline.from_pretrained(folder)
    for part in (pipe.text_encoder, pipe.transformer, pipe.vae):
        cpu_offload(part, torch.device("cpu"))  # as enable_sequential_cpu_offload does
    assert pipe.text_encoder.get_input_embeddings().weight.is_meta
    assert torch.equal(pipe("a red sun", generator=seeded(0)).codes, expected)


def test_threads_with_a_pipeline_each_may_share_the_models(pipe):
    def run(scale):
        own = DQPipeline.from_pipe(pipe)
        own.set_progress_bar_config(disable=True)
        return own("sun", guidance_scale=scale, generator=seeded(0), callback_on_step_end=lambda *given: None).codes

    scales = [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]
    expected = [run(scale) for scale in scales]
    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(*pair) for pair in zip(expected, pool.map(run, scales)))


def test_the_task_takes_a_prompt(model, pipe):
    task = pipeline("dq-generation", model=model)
    options = dict(guidance_scale=2.0, negative_prompt="blue")
    prompts = ["sun", "a red heart", ""]
    expected = pipe(prompts, generator=seeded(3), output_type="codes", **options).codes
    results = task(prompts, seed=3, batch_size=2, **options)
    assert torch.equal(torch.stack([result["codes"] for result in results]), expected)
    assert [result["prompt"] for result in results] == prompts and results[0]["class_label"] is None
    streamed = list(task((prompt for prompt in prompts), seed=3, **options))
    assert torch.equal(torch.stack([result["codes"] for result in streamed]), expected)
    assert torch.equal(task("sun", seed=3, **options)["codes"], expected[0])
    assert torch.equal(task(seed=5)["codes"], task("", seed=5)["codes"])
    for item, error, message in (
        (3, ValueError, "takes a prompt: it has no classes, got 3"),
        ({"prompt": 3}, TypeError, "a prompt must be a text, got 3"),
        ({"text": "sun"}, TypeError, "dictionary of prompt and class_label; got one of text"),
    ):
        with pytest.raises(error, match=message):
            task(["sun", item])
    with pytest.raises(TypeError, match="negative_prompt must be one text"):
        task("sun", negative_prompt=["a", "b"])


def test_without_a_text_encoder_the_task_makes_images_of_no_text(model, pipe):
    task = pipeline("dq-generation", model=DQForImageGeneration.from_models(model.vae, model.transformer))
    expected = pipe(num_images_per_prompt=2, generator=seeded(3), output_type="codes").codes
    assert torch.equal(task(seed=3)["codes"], expected[0])
    assert torch.equal(torch.stack([result["codes"] for result in task([None, ""], seed=3)]), expected)
    with pytest.raises(ValueError, match="prompt needs a text encoder"):
        task(["", "sun"])


def test_the_task_takes_a_prompt_and_a_class():
    model = make_model(**CLASSES)
    task = pipeline("dq-generation", model=model)
    result = task({"prompt": "a red heart", "class_label": "star"}, seed=3)
    assert (result["prompt"], result["label"]) == ("a red heart", "star")
    assert torch.equal(result["codes"], model.generate([2], prompt="a red heart", generator=seeded(3)).codes[0])
    assert task("a red heart", seed=3)["class_label"] in (0, 1, 2)
    class_task = pipeline(
        "dq-generation",
        model=DQForImageGeneration.from_models(make_vae(image_size=8), make_transformer(**SMALL, **CLASSES)),
    )
    with pytest.raises(ValueError, match="unknown class 'a red heart'; known classes: sun, moon, star"):
        class_task("a red heart")
    with pytest.raises(ValueError, match="a prompt is for a model with text; this one takes class_labels"):
        class_task({"prompt": "a red heart"})
