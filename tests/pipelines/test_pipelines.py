"""DQPipeline and the task "dq-generation": one folder, one seed, one image, whichever door; and clear refusals."""

import io
import json
import re

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import make_transformer, make_vae
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, pipeline

from dq_hf import DQForImageGeneration, DQGenerationPipeline, DQImageProcessor, DQPipeline
from dq_hf.commands.main import main

NAMES = {0: "sun", 1: "moon", 2: "star"}
FILES = {
    "README.md",
    "config.json",
    "model_index.json",
    "preprocessor_config.json",
    "transformer/config.json",
    "transformer/model.safetensors",
    "vae/config.json",
    "vae/model.safetensors",
}


def make_parts(**overrides):
    """Tokenizer and generator for 8x8 images, codes of 4x4 and 2x2 pixels."""
    return make_vae(image_size=8), make_transformer(**(dict(grid_sizes=[[2, 2], [4, 4]]) | overrides))


@pytest.fixture(scope="module")
def model():
    """Of three classes, with a hidden one."""
    return DQForImageGeneration.from_models(*make_parts(num_classes=3, id2label=NAMES, class_dropout=0.2)).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = DQPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def task(folder):
    return pipeline("dq-generation", model=str(folder))


@pytest.fixture(scope="module")
def unconditional():
    pipe = DQPipeline(*make_parts())
    pipe.set_progress_bar_config(disable=True)
    return pipe, pipeline("dq-generation", model=DQForImageGeneration.from_models(pipe.vae, pipe.transformer))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def pixels(image):
    return np.asarray(image).tolist()


def to_8_bit(pixel_values):
    """Images (B, height, width, 3) of 8 bits, as nested lists."""
    scaled = (pixel_values.float().permute(0, 2, 3, 1).numpy().clip(-1, 1) + 1) / 2 * 255
    return np.round(scaled).astype(int).tolist()


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def from_pipe(folder, tmp_path):
    return DQPipeline.from_pretrained(folder)(class_labels="moon", generator=seeded(3)).images[0]


def from_task(folder, tmp_path):
    return pipeline("dq-generation", model=str(folder))("moon", seed=3)["image"]


def from_auto_model(folder, tmp_path):
    generated = AutoModel.from_pretrained(folder).generate([1], generator=seeded(3))
    return DQImageProcessor().post_process(generated.pixel_values)[0]


def from_composite(folder, tmp_path):
    generated = DQForImageGeneration.from_pretrained(folder).generate(1, generator=seeded(3))
    return DQImageProcessor().post_process(generated.pixel_values)[0]


def from_command_line(folder, tmp_path):
    options = ["--class-label", "moon", "-n", "1", "--seed", "3", "--output", str(tmp_path / "moon.png")]
    main(["generate", "--model", str(folder), *options])
    return Image.open(tmp_path / "moon.png")


@pytest.mark.parametrize("door", [from_pipe, from_task, from_auto_model, from_composite, from_command_line])
def test_one_seed_is_one_image_through_every_door(model, folder, tmp_path, door):
    codes = model.transformer.generate([1], generator=seeded(3)).codes
    with torch.no_grad():
        expected = to_8_bit(model.vae.decode_codes(codes).sample)[0]
    assert pixels(door(folder, tmp_path)) == expected


def test_a_result_says_what_it_is(task):
    result = task("moon", seed=0)
    assert set(result) == {"image", "class_label", "label", "codes", "grain_map"}
    assert isinstance(result["image"], Image.Image) and result["image"].size == (8, 8)
    assert result["class_label"] == 1 and result["label"] == "moon"
    assert result["codes"].shape == (4, 4) and result["grain_map"].shape == (2, 2)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 5])
def test_batches_change_nothing(task, pipe, batch_size):
    inputs = ["sun", "star", 1, 0, 2]
    results = task(inputs, seed=7, batch_size=batch_size)
    output = pipe(class_labels=inputs, generator=seeded(7))
    assert [result["class_label"] for result in results] == [0, 2, 1, 0, 2]
    assert [result["codes"].tolist() for result in results] == output.codes.tolist()
    assert [result["grain_map"].tolist() for result in results] == output.grain_maps.tolist()
    assert [pixels(result["image"]) for result in results] == [pixels(image) for image in output.images]


def test_the_batch_size_of_the_task_is_the_default(folder, task):
    batched = pipeline("dq-generation", model=str(folder), batch_size=2)
    sizes = []
    batched.model.transformer.content_embedding.register_forward_hook(lambda *call: sizes.append(len(call[1][0])))
    results = batched(["sun"] * 5, seed=1)
    assert set(sizes) == {2, 1}
    assert [result["codes"].tolist() for result in results] == [
        result["codes"].tolist() for result in task(["sun"] * 5, seed=1)
    ]


def test_each_image_can_have_its_own_seed(task, pipe):
    results = task(["sun", "moon", None], seed=[4, 5, 6], batch_size=2)
    alone = [task("sun", seed=4), task("moon", seed=5), task(None, seed=6)]
    assert [pixels(result["image"]) for result in results] == [pixels(result["image"]) for result in alone]
    listed = pipe(class_labels=["sun", "moon"], generator=[seeded(4), seeded(5)])
    assert [pixels(image) for image in listed.images] == [pixels(result["image"]) for result in alone[:2]]


def test_different_seeds_give_different_images(task):
    codes = {str(task("sun", seed=seed)["codes"].tolist()) for seed in range(4)}
    assert len(codes) == 4


@pytest.mark.parametrize("arguments", [(), (None,)])
def test_no_class_is_a_random_one_that_the_seed_decides(task, arguments):
    labels = [task(*arguments, seed=seed)["class_label"] for seed in range(12)]
    assert set(labels) == {0, 1, 2}
    assert labels[:3] == [task(*arguments, seed=seed)["class_label"] for seed in range(3)]
    result = task(*arguments, seed=0)
    assert result["label"] == NAMES[result["class_label"]]
    assert torch.equal(task(result["label"], seed=0)["codes"], result["codes"])


def test_random_classes_do_not_disturb_their_neighbours(task):
    mixed = task(["sun", None, "star"], seed=9)
    named = task(["sun", "moon", "star"], seed=9)
    assert pixels(mixed[0]["image"]) == pixels(named[0]["image"])
    assert pixels(mixed[2]["image"]) == pixels(named[2]["image"])
    assert [result["class_label"] for result in task([None] * 12, seed=3)] == [
        result["class_label"] for result in task([None] * 12, seed=3, batch_size=5)
    ]


def test_without_a_seed_torchs_own_generator_decides(task, pipe):
    torch.manual_seed(8)
    codes = task("sun")["codes"]
    assert not torch.equal(task("sun")["codes"], codes)
    torch.manual_seed(8)
    assert torch.equal(pipe(class_labels="sun").codes[0], codes)


@pytest.mark.parametrize(
    "labels", [["sun", "star"], [0, 2], (0, "star"), range(0, 3, 2), torch.tensor([0, 2]), np.array([0, 2])]
)
def test_labels_come_in_many_forms(task, pipe, labels):
    expected = pipe(class_labels=[0, 2], generator=seeded(1)).codes
    assert torch.equal(pipe(class_labels=labels, generator=seeded(1)).codes, expected)
    assert torch.equal(torch.stack([result["codes"] for result in task(labels, seed=1)]), expected)


@pytest.mark.parametrize("label", ["moon", 1, np.int64(1), torch.tensor(1)])
def test_one_label_gives_one_result(task, pipe, label):
    expected = pipe(class_labels=label, generator=seeded(1))
    assert len(expected.images) == 1
    assert torch.equal(task(label, seed=1)["codes"], expected.codes[0])


def test_an_empty_list_gives_an_empty_list(task):
    assert task([]) == []
    assert task([], seed=[], batch_size=3) == []


@pytest.mark.parametrize(
    ("label", "error", "message"),
    [
        ("sum", ValueError, "unknown class 'sum'; did you mean 'sun'"),
        ("Moon", ValueError, "did you mean 'moon'"),
        ("xyz", ValueError, "known classes: sun, moon, star"),
        ("1", ValueError, "unknown class '1'"),
        (3, ValueError, r"0 ... 2, got 3"),
        (-1, ValueError, r"0 ... 2, got -1"),
        (1.0, TypeError, "1.0"),
        (True, TypeError, "True"),
        (torch.tensor(1.0), TypeError, "1.0"),
        ({"class": 1}, TypeError, "name or an integer"),
        (["sun", ["moon"]], TypeError, "name or an integer"),
    ],
)
def test_bad_labels_are_refused(task, pipe, label, error, message):
    with pytest.raises(error, match=message):
        task(label)
    with pytest.raises(error, match=message):
        pipe(class_labels=label)


def test_a_conditional_pipeline_needs_labels(pipe):
    with pytest.raises(ValueError, match="give class_labels"):
        pipe()
    with pytest.raises(ValueError, match="class_labels must hold at least one label"):
        pipe(class_labels=[])


def test_unconditional_models_take_no_labels(unconditional):
    pipe, task = unconditional
    output = pipe(num_images_per_label=3, generator=seeded(2))
    assert len(output.images) == 3
    results = task([None, None, None], seed=2, batch_size=2)
    assert [pixels(result["image"]) for result in results] == [pixels(image) for image in output.images]
    assert task(seed=2)["class_label"] is None and task(seed=2)["label"] is None
    for call in (lambda: pipe(class_labels=[1]), lambda: task("sun"), lambda: task([None, 0])):
        with pytest.raises(ValueError, match="unconditional"):
            call()


def test_images_of_one_label_come_one_after_the_other(pipe):
    several = pipe(class_labels=["star", "sun"], num_images_per_label=2, generator=seeded(4))
    listed = pipe(class_labels=[2, 2, 0, 0], generator=seeded(4))
    assert torch.equal(several.codes, listed.codes)
    assert len({str(codes.tolist()) for codes in several.codes}) == 4


def test_output_types_show_the_same_images(pipe):
    outputs = {
        output_type: pipe(class_labels=[0, 1], generator=seeded(5), output_type=output_type)
        for output_type in ("pil", "np", "pt", "codes")
    }
    assert all(torch.equal(output.codes, outputs["pil"].codes) for output in outputs.values())
    with torch.no_grad():
        sample = pipe.vae.decode_codes(outputs["pil"].codes).sample
    assert [pixels(image) for image in outputs["pil"].images] == to_8_bit(sample)
    expected = (sample.clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(outputs["pt"].images, expected)
    assert isinstance(outputs["np"].images, np.ndarray)
    np.testing.assert_allclose(outputs["np"].images, expected.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert torch.equal(outputs["codes"].images, outputs["codes"].codes)
    assert outputs["pil"].grain_maps.shape == (2, 2, 2)


def test_codes_are_given_without_decoding(pipe):
    calls = []
    handle = pipe.vae.decoder.register_forward_hook(lambda *call: calls.append(1))
    pipe(class_labels=[0], output_type="codes")
    assert not calls
    pipe(class_labels=[0], output_type="pt")
    handle.remove()
    assert calls == [1]


def test_the_callback_sees_every_element(pipe, model):
    steps, seen = [], []

    def callback(pipeline, step, timestep, tensors):
        assert pipeline is pipe and set(tensors) == {"codes", "grain_map", "taken", "lengths"}
        steps.append((step, timestep))
        seen.append({name: tensor.clone() for name, tensor in tensors.items()})

    names = ["codes", "grain_map", "taken", "lengths"]
    output = pipe(
        class_labels=[0, 1, 2],
        generator=seeded(6),
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    )
    lengths = model.transformer.generate([0, 1, 2], generator=seeded(6)).lengths
    assert steps == [(i, i) for i in range(int(lengths.max()) - 1)]  # the first element is the start token
    assert torch.equal(seen[-1]["codes"].view(3, 4, 4), output.codes)
    assert torch.equal(seen[-1]["grain_map"].view(3, 4, 4)[:, ::2, ::2], output.grain_maps)
    assert torch.equal(seen[-1]["lengths"], lengths)
    assert seen[0]["lengths"].tolist() == [2, 2, 2]
    taken = torch.stack([torch.zeros(3, 16, dtype=torch.bool), *(step["taken"] for step in seen)])
    new = taken[1:] & ~taken[:-1]  # a fine cell, the four of a coarse code, or none
    assert taken[-1].all() and (taken[1:] | ~taken[:-1]).all() and set(new.sum(2).flatten().tolist()) == {0, 1, 4}
    for step in seen:
        assert torch.equal(step["codes"][step["taken"]], output.codes.flatten(1)[step["taken"]])


def test_the_progress_bar_counts_the_elements(folder):
    pipe, text = DQPipeline.from_pretrained(folder), io.StringIO()
    pipe.set_progress_bar_config(file=text, mininterval=0)
    steps = []
    pipe(class_labels=[0], generator=seeded(6), callback_on_step_end=lambda *call: steps.append(call[1]))
    last = text.getvalue().split("\r")[-1]
    assert "100%" in last and f" {len(steps)}/{len(steps)} " in last
    assert len(steps) < 2 * 16 + 4


BAD_SAMPLING = [
    (dict(temperature=0.0), ValueError),
    (dict(temperature=-1.0), ValueError),
    (dict(temperature=float("nan")), ValueError),
    (dict(temperature="1"), TypeError),
    (dict(top_k=0), ValueError),
    (dict(top_k=2.5), TypeError),
    (dict(top_p=0.0), ValueError),
    (dict(top_p=1.01), ValueError),
    (dict(position_temperature=0.0), ValueError),
    (dict(position_top_k=-3), ValueError),
    (dict(position_top_p=2.0), ValueError),
    (dict(guidance_scale=float("inf")), ValueError),
    (dict(guidance_scale=-1.0), ValueError),
    (dict(fine_positions="both"), ValueError),
    (dict(temprature=0.5), TypeError),
]


@pytest.mark.parametrize(("arguments", "error"), BAD_SAMPLING)
def test_bad_sampling_arguments_are_refused_by_name(pipe, task, arguments, error):
    for call in (lambda: pipe(class_labels=[0], **arguments), lambda: task("sun", **arguments)):
        with pytest.raises(error, match=next(iter(arguments))):
            call()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(num_images_per_label=0), ValueError, "num_images_per_label must be at least 1, got 0"),
        (dict(num_images_per_label=-2), ValueError, "num_images_per_label must be at least 1, got -2"),
        (dict(num_images_per_label=1.5), TypeError, "num_images_per_label"),
        (dict(num_images_per_label=True), TypeError, "num_images_per_label"),
        (dict(output_type="jpg"), ValueError, "pil, np, pt, codes; got 'jpg'"),
        (dict(callback_on_step_end_tensor_inputs=["latents"]), ValueError, "latents"),
        (dict(generator=7), TypeError, "generator"),
        (dict(generator=[torch.Generator()]), ValueError, "list of 2, one for each image; got 1"),
        (dict(num_inference_steps=50), TypeError, "num_inference_steps"),
    ],
)
def test_bad_arguments_of_the_pipeline_are_refused(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        pipe(class_labels=[0, 1], **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(batch_size=0), ValueError, "batch_size"),
        (dict(batch_size=2.0), ValueError, "batch_size"),
        (dict(seed="7"), TypeError, "seed must be an integer"),
        (dict(seed=1.5), TypeError, "seed must be an integer"),
        (dict(seed=2**64), ValueError, "seed must lie in 0 ... 18446744073709551615, got 18446744073709551616"),
        (dict(seed=[0, -1]), ValueError, "seed must lie in 0 ... 18446744073709551615, got -1"),
        (dict(seed=[1]), ValueError, "list of 2, one for each image; got 1"),
        (dict(sead=1), TypeError, "unknown argument.* sead"),
        (dict(num_images=3), TypeError, "unknown argument.* num_images"),
        (dict(num_workers=1), TypeError, "unknown argument.* num_workers"),
    ],
)
def test_bad_arguments_of_the_task_are_refused(task, arguments, error, message):
    with pytest.raises(error, match=message):
        task(["sun", "moon"], **arguments)


def test_typos_are_refused_when_a_door_is_opened(folder):
    with pytest.raises(TypeError, match="temprature"):
        pipeline("dq-generation", model=str(folder), temprature=0.5)
    with pytest.raises(TypeError, match="seed"):
        pipeline("dq-generation", model=str(folder), seed=1)
    with pytest.raises(TypeError, match="no argument dtyp"):
        DQPipeline.from_pretrained(folder, dtyp=torch.bfloat16)
    with pytest.raises(TypeError, match="typo"):
        DQPipeline.from_pretrained(folder).save_pretrained(folder.parent / "new", typo=1)
    with pytest.raises(TypeError, match="typo"):
        pipeline("dq-generation", model=str(folder)).save_pretrained(folder.parent / "new", typo=1)


def test_sampling_arguments_of_the_opened_task_are_defaults(folder, pipe):
    task = pipeline("dq-generation", model=str(folder), temperature=0.5, fine_positions="free")
    cool = pipe(class_labels=["sun"], temperature=0.5, fine_positions="free", generator=seeded(1)).codes[0]
    warm = pipe(class_labels=["sun"], temperature=2.0, fine_positions="free", generator=seeded(1)).codes[0]
    assert torch.equal(task("sun", seed=1)["codes"], cool)
    assert torch.equal(task("sun", seed=1, temperature=2.0)["codes"], warm) and not torch.equal(cool, warm)


def test_greedy_images_need_no_seed(task):
    assert torch.equal(task("sun", do_sample=False)["codes"], task("sun", do_sample=False)["codes"])


def test_a_top_k_above_the_vocabulary_restricts_nothing(pipe):
    every = pipe(class_labels=[0, 1], generator=seeded(2), top_k=10**6, position_top_k=10**6)
    assert torch.equal(every.codes, pipe(class_labels=[0, 1], generator=seeded(2)).codes)


def test_the_task_refuses_another_model_when_it_is_opened(folder):
    for model in (str(folder / "vae"), str(folder / "transformer"), make_vae()):
        with pytest.raises(ValueError, match="needs a DQForImageGeneration .*got DQ(VAE|Transformer)"):
            pipeline("dq-generation", model=model)
    with pytest.raises(ValueError, match="got Linear"):
        DQGenerationPipeline(model=torch.nn.Linear(1, 1))


def test_the_pipeline_refuses_parts_that_do_not_fit(folder):
    with pytest.raises(ValueError, match="codebook_size is 16, the generator's 4"):
        DQPipeline(*make_parts(codebook_size=4))
    with pytest.raises(ValueError, match="codebook_size is 16, the generator's 4"):
        DQPipeline.from_pretrained(folder, transformer=make_parts(codebook_size=4)[1])


@pytest.mark.parametrize("name", ["no-such-folder", "no/such-folder", "./no/such/folder", "/no/such/folder"])
def test_a_missing_folder_is_named(name):
    with pytest.raises((OSError, ValueError), match=f"{re.escape(name)}.* local"):
        DQPipeline.from_pretrained(name)
    with pytest.raises(OSError):
        DQForImageGeneration.from_pretrained(name)
    with pytest.raises(OSError):
        pipeline("dq-generation", model=name)


def test_damaged_weights_are_refused_by_every_door(model, tmp_path):
    model.save_pretrained(tmp_path)
    path = tmp_path / "vae" / "model.safetensors"
    weights = load_file(path)
    weights["quantizer.codebook"][0, 0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    for door in (DQPipeline.from_pretrained, AutoModel.from_pretrained, lambda path: pipeline("dq-generation", path)):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} .*not finite: quantizer.codebook"):
            door(str(tmp_path))


def test_every_door_saves_the_same_folder(model, folder, pipe, task, tmp_path):
    expected = files_of(folder)
    assert set(expected) == FILES
    for name, door in (("pipe", pipe), ("task", task), ("model", model), ("new", DQPipeline(**pipe.components))):
        door.save_pretrained(tmp_path / name)
        saved = files_of(tmp_path / name)
        assert set(saved) == FILES
        for file in FILES:
            assert saved[file] == expected[file], (name, file)
            assert str(folder).encode() not in saved[file] and b"custom_pipelines" not in saved[file]
    assert json.loads(expected["model_index.json"])["_class_name"] == "DQPipeline"
    again = pipeline("dq-generation", model=str(tmp_path / "pipe"))
    assert torch.equal(again("sun", seed=1)["codes"], task("sun", seed=1)["codes"])
    again = DQPipeline.from_pretrained(tmp_path / "task")(class_labels="sun", generator=seeded(1))
    assert torch.equal(again.codes[0], task("sun", seed=1)["codes"])


def test_components_make_another_pipeline(pipe):
    assert set(pipe.components) == {"vae", "transformer"}
    other = DQPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    expected = pipe(class_labels=[2], generator=seeded(1), output_type="pt").images
    assert torch.equal(other(class_labels=[2], generator=seeded(1), output_type="pt").images, expected)


def test_making_a_pipeline_changes_no_model():
    vae, transformer = make_parts(num_classes=3)
    transformer.set_attn_implementation("eager")
    expected = transformer.generate([0, 1], generator=seeded(1)).codes
    pipe = DQPipeline(vae, transformer)
    assert pipe.vae is vae and pipe.transformer is transformer
    assert transformer.config._attn_implementation == "eager"
    assert torch.equal(pipe(class_labels=[0, 1], generator=seeded(1)).codes, expected)


def test_models_that_wait_on_another_device_are_brought_back_to_work(folder):
    pipe, brought = DQPipeline.from_pretrained(folder), []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            brought.append(module)
            return args, kwargs

    for model in (pipe.vae, pipe.transformer):
        add_hook_to_module(model, Hook())
    pipe(class_labels=["sun"], output_type="codes")
    assert brought == [pipe.transformer]
    pipe(class_labels=["sun"])
    assert brought == [pipe.transformer, pipe.transformer, pipe.vae]


def weight_dtypes(*models):
    return {model.get_parameter(name).dtype for model in models for name, _ in model.named_parameters()}


def test_dtype_is_chosen_when_a_door_is_opened(folder):
    pipe = DQPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    task = pipeline("dq-generation", model=str(folder), dtype=torch.bfloat16)
    for models in ((pipe.vae, pipe.transformer), (task.model.vae, task.model.transformer)):
        assert weight_dtypes(*models) == {torch.bfloat16}
        assert models[0].quantizer.codebook.dtype == torch.float32
    output = pipe(class_labels=["moon"], generator=seeded(1))
    result = task("moon", seed=1)
    assert torch.equal(output.codes[0], result["codes"])
    assert pixels(output.images[0]) == pixels(result["image"])


def test_a_pipeline_moves_to_a_device_and_a_dtype(folder):
    pipe = DQPipeline.from_pretrained(folder).to("cpu", torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.device.type == "cpu" and weight_dtypes(pipe.vae, pipe.transformer) == {torch.bfloat16}
    assert pipe(class_labels=["moon"]).images[0].size == (8, 8)


def test_weights_stored_in_half_precision_are_computed_in_float32_by_every_door(model, tmp_path):
    model.save_pretrained(tmp_path)
    rounded = {}
    for part in ("vae", "transformer"):
        path = tmp_path / part / "model.safetensors"
        rounded[part] = {key: value.bfloat16() for key, value in load_file(path).items()}
        save_file(rounded[part], path, metadata={"format": "pt"})
        assert json.loads((tmp_path / part / "config.json").read_text())["dtype"] == "float32"

    vae, transformer = make_parts(num_classes=3, id2label=NAMES, class_dropout=0.2)
    vae.load_state_dict(rounded["vae"])  # copies into float32
    transformer.load_state_dict(rounded["transformer"])
    codes = transformer.generate([1], generator=seeded(3)).codes
    with torch.no_grad():
        expected = to_8_bit(vae.decode_codes(codes).sample)[0]
    for door in (from_pipe, from_task, from_auto_model, from_composite):
        assert pixels(door(tmp_path, tmp_path)) == expected, door.__name__
    pipe = DQPipeline.from_pretrained(tmp_path)
    assert weight_dtypes(pipe.vae, pipe.transformer) == {torch.float32}


def test_the_interfaces_of_a_diffusers_pipeline(pipe):
    whole = pipe(class_labels=[0], generator=seeded(6), output_type="np")
    assert pipe(class_labels=[0], generator=seeded(6), output_type="codes", return_dict=False)[1].equal(whole.codes)
    assert pipe.num_timesteps == pipe.transformer.config.longest_stream - 1 and not pipe.interrupt
    pipe(class_labels=[0], guidance_scale=2.0, output_type="codes")
    assert pipe.guidance_scale == 2.0

    def stop_early(pipe, step, timestep, tensors):
        pipe._interrupt = step == 2
        return tensors

    stopped = pipe(class_labels=[0], generator=seeded(6), output_type="np", callback_on_step_end=stop_early)
    there = stopped.codes >= 0
    assert 0 < there.sum() < there.numel() and torch.equal(stopped.codes[there], whole.codes[there])
    assert stopped.images.shape == whole.images.shape
    assert pipe(class_labels=[0], generator=seeded(6)).codes.equal(whole.codes)  # and the next call is whole again


def test_a_callback_cannot_change_what_was_drawn(pipe):
    with pytest.raises(ValueError, match="must return the tensors that it got, or None; codes are others"):
        pipe(class_labels=[0], callback_on_step_end=lambda *call: {"codes": call[3]["codes"] + 1})
