"""DQPipeline and the task "dq-generation": one folder, one seed, one image, whichever door; and clear refusals."""

import io
import json
import re

import datasets
import numpy as np
import pytest
import torch
from conftest import edit_weights, make_transformer, make_vae, seeded
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import AutoModel, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from dq_hf import (
    DQForImageGeneration,
    DQGenerationPipeline,
    DQImageProcessor,
    DQInpaintPipeline,
    DQPipeline,
    DQTransformerForImageGeneration,
)
from dq_hf.commands.main import main

NAMES = {0: "sun", 1: "moon", 2: "star"}


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


def pixels_of(results):
    """Bytes of images, or of lists or results of the task that hold them."""
    if isinstance(results, dict):
        return pixels_of(results["image"])
    return [pixels_of(each) for each in results] if isinstance(results, list) else results.tobytes()


@pytest.fixture(scope="module")
def task(folder):
    return pipeline("dq-generation", model=str(folder))


@pytest.fixture(scope="module")
def unconditional():
    pipe = DQPipeline(*make_parts())
    pipe.set_progress_bar_config(disable=True)
    return pipe, pipeline("dq-generation", model=DQForImageGeneration.from_models(pipe.vae, pipe.transformer))


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


def from_auto_model(folder, tmp_path, model_class=AutoModel):
    generated = model_class.from_pretrained(folder).generate([1], generator=seeded(3))
    return DQImageProcessor().post_process(generated.pixel_values)[0]


def from_composite(folder, tmp_path):
    return from_auto_model(folder, tmp_path, DQForImageGeneration)


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


@pytest.mark.parametrize("batch_size", [None, 1, 2, 5])
def test_batches_change_nothing(folder, task, pipe, batch_size):
    inputs, sizes = ["sun", "star", 1, 0, 2], []
    output = pipe(class_labels=inputs, generator=seeded(7))
    by_default = pipeline("dq-generation", model=str(folder), batch_size=batch_size)
    embedding = by_default.model.transformer.content_embedding
    embedding.register_forward_hook(lambda *call: sizes.append(len(call[1][0])))
    for results in (task(inputs, seed=7, batch_size=batch_size), by_default(inputs, seed=7)):
        assert [result["class_label"] for result in results] == [0, 2, 1, 0, 2]
        assert [result["codes"].tolist() for result in results] == output.codes.tolist()
        assert [result["grain_map"].tolist() for result in results] == output.grain_maps.tolist()
        assert [pixels(result["image"]) for result in results] == [pixels(image) for image in output.images]
    assert set(sizes) == {None: {1}, 1: {1}, 2: {2, 1}, 5: {5}}[batch_size]
    assert len({str(codes.tolist()) for codes in output.codes}) == 5


def test_several_elements_a_pass_give_the_same_images_and_fewer_steps(task, pipe):
    inputs, steps = ["sun", "star", "moon"], []

    def callback(pipeline, step, timestep, tensors):
        steps.append(step)
        return tensors

    expected = pipe(class_labels=inputs, generator=seeded(7), callback_on_step_end=callback)
    one_by_one = len(steps)
    output = pipe(class_labels=inputs, generator=seeded(7), callback_on_step_end=callback, lookahead=4)
    assert len(steps) < 2 * one_by_one
    assert [pixels(image) for image in output.images] == [pixels(image) for image in expected.images]
    results = task(inputs, seed=7, batch_size=2, lookahead=4)
    assert [pixels(result["image"]) for result in results] == [pixels(image) for image in expected.images]


def test_detail_can_be_prescribed(task, pipe):
    maps = torch.tensor([[[0, 1], [1, 0]], [[1, 1], [0, 0]], [[0, 0], [0, 0]]])
    for grain_map in (maps, maps.numpy(), maps.tolist()):
        output = pipe(class_labels=[0, 1, 2], grain_map=grain_map, generator=seeded(3))
        assert torch.equal(output.grain_maps, maps)
    output = pipe(class_labels=[0, 1, 2], grain_map=maps[0], generator=seeded(3))
    results = task([0, 1, 2], seed=3, batch_size=2, grain_map=maps[0])
    assert [result["codes"].tolist() for result in results] == output.codes.tolist()
    assert all(torch.equal(result["grain_map"], maps[0]) for result in results)
    output = pipe(class_labels=[0, 1, 2], fine_ratio=0.75, num_candidates=2, generator=seeded(3))
    assert output.grain_maps.flatten(1).sum(1).tolist() == [3, 3, 3]
    results = task([0, 1, 2], seed=3, fine_ratio=0.75, num_candidates=2)
    assert [result["codes"].tolist() for result in results] == output.codes.tolist()


def test_each_image_can_have_its_own_seed(task, pipe):
    results = task(["sun", "moon", None], seed=[4, 5, 6], batch_size=2)
    alone = [task("sun", seed=4), task("moon", seed=5), task(None, seed=6)]
    assert [pixels(result["image"]) for result in results] == [pixels(result["image"]) for result in alone]
    listed = pipe(class_labels=["sun", "moon"], generator=[seeded(4), seeded(5)])
    assert [pixels(image) for image in listed.images] == [pixels(result["image"]) for result in alone[:2]]


@pytest.mark.parametrize("arguments", [(), (None,)])
def test_no_class_is_a_random_one_that_the_seed_decides(task, arguments):
    labels = [task(*arguments, seed=seed)["class_label"] for seed in range(12)]
    assert set(labels) == {0, 1, 2}
    assert labels[:3] == [task(*arguments, seed=seed)["class_label"] for seed in range(3)]
    result = task(*arguments, seed=0)
    assert result["label"] == NAMES[result["class_label"]]
    assert torch.equal(task(result["label"], seed=0)["codes"], result["codes"])
    assert set(result) == {"image", "class_label", "label", "codes", "grain_map"}
    assert result["codes"].shape == (4, 4) and result["grain_map"].shape == (2, 2)


class Classes(Dataset):
    """Of torch, with a length and without an iterator."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class Rows(torch.utils.data.IterableDataset):
    """Of a known length, but without numbered places."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)

    def __len__(self):
        return len(self.items)


STREAMS = {
    "rows": Rows,
    "generator": lambda items: (item for item in items),
    "torch": Classes,
    "iterator": iter,
    "column": lambda items: KeyDataset(datasets.Dataset.from_dict({"name": items}), "name"),
    "plain column": lambda items: datasets.Dataset.from_dict({"name": items})["name"],
}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("generator", {}),
        ("generator", dict(batch_size=2, num_workers=3)),
        ("torch", dict(batch_size=3, num_workers=2)),
        ("iterator", dict(batch_size=4)),
        ("column", dict(num_workers=1)),
        ("rows", dict(num_workers=2)),
        ("plain column", dict(batch_size=2)),
    ],
)
def test_streams_give_a_lists_results_one_by_one(task, kind, options):
    items = ["sun", None, "star", "moon", None]
    expected = task(items, seed=4)
    state = torch.get_rng_state()
    results = task(STREAMS[kind](items), seed=4, **options)
    assert iter(results) is iter(results)  # not a list
    results = list(results)
    assert [result["label"] for result in results] == [result["label"] for result in expected]
    for result, other in zip(results, expected):
        assert torch.equal(result["codes"], other["codes"]) and pixels(result["image"]) == pixels(other["image"])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_stream_is_read_as_its_results_are_asked_for(task):
    read = []
    results = task(
        (read.append(name) or name for name in ("sun", "moon", "xyz", "star")), seed=[1, 2, 3], batch_size=1
    )
    assert not read
    assert torch.equal(next(results)["codes"], task("sun", seed=1)["codes"]) and read == ["sun"]
    assert torch.equal(next(results)["codes"], task("moon", seed=2)["codes"])
    with pytest.raises(ValueError, match="unknown class 'xyz'"):
        next(results)
    with pytest.raises(ValueError, match="more than 1 came"):
        list(task(iter(["sun", "moon"]), seed=[1]))
    with pytest.raises(ValueError, match="a list of 2, one for each image; got 1"):
        task(Classes(["sun", "moon"]), seed=[1])
    with pytest.raises(TypeError, match="got one of name; .*KeyDataset"):
        list(task(datasets.Dataset.from_dict({"name": ["sun"]})))
    assert list(task(iter([]))) == []


def test_random_classes_do_not_disturb_their_neighbours(task):
    mixed = task(["sun", None, "star"], seed=9)
    named = task(["sun", "moon", "star"], seed=9)
    assert pixels(mixed[0]["image"]) == pixels(named[0]["image"])
    assert pixels(mixed[2]["image"]) == pixels(named[2]["image"])
    assert [result["class_label"] for result in task([None] * 12, seed=3)] == [
        result["class_label"] for result in task([None] * 12, seed=3, batch_size=5)
    ]
    torch.manual_seed(8)  # without a seed torch's own generator decides
    codes = task("sun")["codes"]
    assert not torch.equal(task("sun")["codes"], codes)
    torch.manual_seed(8)
    assert torch.equal(task("sun")["codes"], codes)


@pytest.mark.parametrize(
    "labels", [["sun", "star"], [0, 2], (0, "star"), range(0, 3, 2), torch.tensor([0, 2]), np.array([0, 2])]
)
def test_labels_come_in_many_forms(task, pipe, labels):
    expected = pipe(class_labels=[0, 2], generator=seeded(1)).codes
    assert torch.equal(pipe(class_labels=labels, generator=seeded(1)).codes, expected)
    assert torch.equal(torch.stack([result["codes"] for result in task(labels, seed=1)]), expected)
    assert torch.equal(pipe(class_labels=labels[1], generator=seeded(1)).codes[0], task(labels[1], seed=1)["codes"])
    several = pipe(class_labels=labels, num_images_per_label=2, generator=seeded(4)).codes
    assert torch.equal(several, pipe(class_labels=[0, 0, 2, 2], generator=seeded(4)).codes)
    assert task([]) == [] == task([], seed=[], batch_size=3)


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


def test_output_types_show_the_same_images_and_codes_are_not_decoded(pipe):
    outputs, decoded = {}, []
    handle = pipe.vae.decoder.register_forward_hook(lambda *call: decoded.append(output_type))
    for output_type in ("pil", "np", "pt", "codes"):
        outputs[output_type] = pipe(class_labels=[0, 1], generator=seeded(5), output_type=output_type)
    handle.remove()
    assert set(decoded) == {"pil", "np", "pt"}
    assert all(torch.equal(output.codes, outputs["pil"].codes) for output in outputs.values())
    with torch.no_grad():
        sample = pipe.vae.decode_codes(outputs["pil"].codes).sample
    assert [pixels(image) for image in outputs["pil"].images] == to_8_bit(sample)
    expected = (sample.clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(outputs["pt"].images, expected)
    np.testing.assert_allclose(outputs["np"].images, expected.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert torch.equal(outputs["codes"].images, outputs["codes"].codes)
    assert outputs["pil"].grain_maps.shape == (2, 2, 2)


def test_the_callback_sees_every_element_which_the_progress_bar_counts(folder, model):
    pipe, text, steps, seen = DQPipeline.from_pretrained(folder), io.StringIO(), [], []
    pipe.set_progress_bar_config(file=text, mininterval=0)

    def callback(pipeline, step, timestep, tensors):
        assert pipeline is pipe and set(tensors) == set(names)
        steps.append((step, timestep))
        seen.append({name: tensor.clone() for name, tensor in tensors.items()})

    names = ["codes", "grain_map", "taken", "lengths"]
    options = dict(callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    output = pipe(class_labels=[0, 1, 2], generator=seeded(6), **options)
    lengths = model.transformer.generate([0, 1, 2], generator=seeded(6)).lengths
    assert steps == [(i, i) for i in range(int(lengths.max()) - 1)]  # the first element is the start token
    last = text.getvalue().split("\r")[-1]
    assert "100%" in last and f" {len(steps)}/{len(steps)} " in last
    assert torch.equal(seen[-1]["codes"].view(3, 4, 4), output.codes)
    assert torch.equal(seen[-1]["grain_map"].view(3, 4, 4)[:, ::2, ::2], output.grain_maps)
    assert torch.equal(seen[-1]["lengths"], lengths) and seen[0]["lengths"].tolist() == [2, 2, 2]
    taken = torch.stack([torch.zeros(3, 16, dtype=torch.bool), *(step["taken"] for step in seen)])
    new = taken[1:] & ~taken[:-1]  # a fine cell, the four of a coarse code, or none
    assert taken[-1].all() and (taken[1:] | ~taken[:-1]).all() and set(new.sum(2).flatten().tolist()) == {0, 1, 4}
    for step in seen:
        assert torch.equal(step["codes"][step["taken"]], output.codes.flatten(1)[step["taken"]])
    with pytest.raises(ValueError, match="must return the tensors that it got, or None; codes are others"):
        pipe(class_labels=[0], callback_on_step_end=lambda *call: {"codes": call[3]["codes"] + 1})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(class_labels=None), ValueError, "give class_labels"),
        (dict(class_labels=[]), ValueError, "class_labels must hold at least one label"),
        (dict(num_images_per_label=0), ValueError, "num_images_per_label must be at least 1, got 0"),
        (dict(num_images_per_label=1.5), TypeError, "num_images_per_label"),
        (dict(num_images_per_label=True), TypeError, "num_images_per_label"),
        (dict(output_type="jpg"), ValueError, "pil, np, pt, codes; got 'jpg'"),
        (dict(callback_on_step_end_tensor_inputs=["latents"]), ValueError, "latents"),
        (dict(generator=7), TypeError, "generator"),
        (dict(generator=[torch.Generator()]), ValueError, "list of 2, one for each image; got 1"),
        (dict(num_inference_steps=50), TypeError, "num_inference_steps"),
        (dict(num_images_per_promt=2), TypeError, "did you mean num_images_per_prompt?"),
        (dict(output_typ="pt"), TypeError, "did you mean output_type?"),
        (dict(num_images=2), TypeError, "num_images is .*; here it is num_images_per_prompt, or num_images_per_label"),
        (dict(lookahead=0), ValueError, "lookahead must be at least 1, got 0"),
    ],
)
def test_bad_arguments_of_the_pipeline_are_refused(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        pipe(**({"class_labels": [0, 1]} | arguments))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (dict(temperature=0.0), ValueError),
        (dict(top_k=2.5), TypeError),
        (dict(position_top_p=2.0), ValueError),
        (dict(guidance_scale=-1.0), ValueError),
        (dict(temprature=0.5), TypeError),
    ],
)
def test_bad_sampling_arguments_are_refused_by_name(pipe, task, arguments, error):
    for call in (lambda: pipe(class_labels=[0], **arguments), lambda: task("sun", **arguments)):
        with pytest.raises(error, match=next(iter(arguments))):
            call()


def test_numbers_of_numpy_are_numbers(pipe, task):
    options = dict(temperature=0.5, top_k=5, top_p=0.75, guidance_scale=1.5, lookahead=2)
    numpy_options = {
        name: (np.int64 if isinstance(value, int) else np.float32)(value) for name, value in options.items()
    }
    for seed, same in ((3, np.int64(3)), ([3, 4], [np.int64(3), np.uint8(4)])):
        plain = task(["sun", "moon"], seed=seed, batch_size=2, **options)
        assert pixels_of(task(["sun", "moon"], seed=same, batch_size=np.int64(2), **numpy_options)) == pixels_of(plain)
    drawn = [
        pipe(class_labels=[0], num_images_per_prompt=count, generator=torch.Generator().manual_seed(3), **each).images
        for count, each in ((2, options), (np.int64(2), numpy_options))
    ]
    assert pixels_of(drawn[0]) == pixels_of(drawn[1])


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
        (dict(sead=1), TypeError, "unknown argument.* sead; did you mean seed?"),
        (dict(generator=torch.Generator()), TypeError, "here it is seed"),
        (dict(fine_ration=0.5), TypeError, "unknown argument.* fine_ration; did you mean fine_ratio?"),
        (dict(grain_map=torch.zeros(2, 4, 4)), ValueError, "grain_map must be one map .* for all images, got 2"),
        (dict(num_images=3), TypeError, "unknown argument.* num_images"),
        (dict(num_workers=-1), ValueError, "num_workers must be a whole number of at least 0, got -1"),
    ],
)
def test_bad_arguments_of_the_task_are_refused(task, arguments, error, message):
    with pytest.raises(error, match=message):
        task(["sun", "moon"], **arguments)


class OwnGenerator(DQTransformerForImageGeneration):
    """With an argument of its own."""

    def generate_steps(self, *arguments, own=None, **options):
        self.own = own
        return super().generate_steps(*arguments, **options)


def test_arguments_of_ones_own_generator_reach_it():
    model = DQForImageGeneration.from_models(make_vae(), OwnGenerator(make_transformer(num_classes=3).config)).eval()
    pipe = DQPipeline(model.vae, model.transformer)
    inpaint = DQInpaintPipeline.from_pipe(pipe)
    picture = dict(image=Image.new("RGB", (16, 16)), mask_image=Image.new("L", (16, 16), 255))
    calls = model.transformer.generate, model.generate, pipe, lambda **options: inpaint(**picture, **options)
    for i, call in enumerate(calls):
        call(class_labels=[0], own=i, generator=seeded())
        assert model.transformer.own == i
        with pytest.raises(TypeError, match="unknown argument.* owm; did you mean own"):
            call(class_labels=[0], owm=i)


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


def test_models_that_do_not_fit_are_refused(folder):
    for model in (str(folder / "vae"), str(folder / "transformer"), make_vae()):
        with pytest.raises(ValueError, match="needs a DQForImageGeneration .*got DQ(VAE|Transformer)"):
            pipeline("dq-generation", model=model)
    with pytest.raises(ValueError, match="got Linear"):
        DQGenerationPipeline(model=torch.nn.Linear(1, 1))
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
    edit_weights(path, lambda weights: weights["quantizer.codebook"][0].fill_(torch.nan))
    for door in (DQPipeline.from_pretrained, AutoModel.from_pretrained, lambda path: pipeline("dq-generation", path)):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} .*not finite: quantizer.codebook"):
            door(str(tmp_path))


def test_every_door_saves_the_same_folder(model, folder, pipe, task, tmp_path):
    expected = files_of(folder)
    assert json.loads(expected["model_index.json"])["_class_name"] == "DQPipeline"
    assert not any(str(folder).encode() in content for content in expected.values())
    for name, door in (("pipe", pipe), ("task", task), ("model", model), ("new", DQPipeline(**pipe.components))):
        door.save_pretrained(tmp_path / name)
        assert files_of(tmp_path / name) == expected, name


def weight_dtypes(*models):
    return {model.get_parameter(name).dtype for model in models for name, _ in model.named_parameters()}


def test_dtype_is_chosen_when_a_door_is_opened_or_later(folder):
    task = pipeline("dq-generation", model=str(folder), dtype=torch.bfloat16)
    result = task("moon", seed=1)
    assert weight_dtypes(task.model.vae, task.model.transformer) == {torch.bfloat16}
    chosen = DQPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    for pipe in (chosen, DQPipeline.from_pretrained(folder).to("cpu", torch.bfloat16)):
        assert pipe.device.type == "cpu" and weight_dtypes(pipe.vae, pipe.transformer) == {torch.bfloat16}
        assert pipe.vae.quantizer.codebook.dtype == torch.float32
        output = pipe(class_labels=["moon"], generator=seeded(1))
        assert torch.equal(output.codes[0], result["codes"])
        assert pixels(output.images[0]) == pixels(result["image"])


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
    side = whole.codes.shape[1] // whole.grain_maps.shape[1]
    expected = whole.grain_maps.where(there[:, ::side, ::side], -1)
    assert torch.equal(stopped.grain_maps, expected)
    stopped = pipe(class_labels=[0], generator=seeded(6), output_type="codes", callback_on_step_end=stop_early)
    assert torch.equal(stopped.images, stopped.codes) and (stopped.codes < 0).any()
    assert pipe(class_labels=[0], generator=seeded(6)).codes.equal(whole.codes)  # and the next call is whole again
