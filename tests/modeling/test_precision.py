"""Half precision, devices, attention implementations and gradient checkpointing change what they should, nothing else."""

import pytest
import torch
from conftest import make_transformer, make_vae, seeded

from dq_hf import DQForImageGeneration, DQPipeline, DQTransformerForImageGeneration, DQVAEModel
from dq_hf.modeling.layers_dqtransformer import eager_attention_forward


@pytest.fixture(scope="module")
def images():
    return torch.rand(4, 3, 16, 16, generator=seeded()) * 2 - 1


@pytest.fixture(scope="module")
def model(tiny_vae, tiny_transformer_class):
    return DQForImageGeneration.from_models(tiny_vae, tiny_transformer_class)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def expected(model, images):
    """What the model in float32 gives: codes, reconstructions, samples."""
    with torch.no_grad():
        codes = model.vae.encode(images).codes
        return codes, model.vae.decode_codes(codes).sample, sample(model)


def sample(model):
    return model.generate([0, 1, 2], generator=seeded(), guidance_scale=2.0)


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_encodes_decodes_and_samples(folder, model, images, expected, dtype):
    half = DQForImageGeneration.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    for name, value in model.vae.quantizer.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(half.vae.quantizer.state_dict()[name], value)
    cast = DQForImageGeneration.from_pretrained(folder).to(dtype).state_dict()
    piped = DQPipeline.from_pretrained(folder).to(dtype).vae.state_dict()
    for name, value in half.state_dict().items():
        assert cast[name].dtype == value.dtype and torch.equal(cast[name], value)
        assert not name.startswith("vae.") or torch.equal(piped[name.removeprefix("vae.")], value)
    codes, reconstructions, _ = expected
    with torch.no_grad():
        encoded = half.vae.encode(images)
        decoded = half.vae.decode_codes(codes).sample
    assert encoded.quantized.dtype == decoded.dtype == dtype
    assert (encoded.codes == codes).float().mean() > 0.9
    assert (decoded - reconstructions).abs().max() < 4 * torch.finfo(dtype).eps  # images are about in [-1, 1]
    samples = sample(half)
    assert samples.pixel_values.dtype == dtype and samples.pixel_values.isfinite().all()
    stream = half.transformer.generate([0, 1, 2], generator=seeded(), guidance_scale=2.0)
    unpacked, _ = half.transformer.unpack(stream.contents, stream.positions, stream.lengths)
    assert torch.equal(unpacked, samples.codes)


def test_the_codebook_learns_in_float32_in_a_model_of_bfloat16(images):
    vae = make_vae(restart_dead_codes=False).to(torch.bfloat16).train()
    before = vae.quantizer.codebook.clone()
    vae.encode(images)
    after = vae.quantizer.codebook
    assert after.dtype == torch.float32 and not torch.equal(after, before)
    assert not torch.equal(after, after.bfloat16().float())


def test_a_codebook_moves_to_another_device_with_its_model():
    vae = make_vae().to(torch.bfloat16)
    assert vae.to("meta").quantizer.codebook.is_meta
    assert vae.to_empty(device="cpu").quantizer.codebook.shape == (16, 8)


# Devices


@pytest.mark.parametrize("max_memory", [None, {"cpu": "70KB"}])
def test_what_does_not_fit_into_memory_is_offloaded_and_changes_nothing(
    folder, images, expected, tmp_path, max_memory
):
    options = dict(device_map="auto", max_memory=max_memory, offload_folder=tmp_path)
    offloaded = DQForImageGeneration.from_pretrained(folder, **options)
    for part in (offloaded.vae, offloaded.transformer) if max_memory else ():
        assert set(part.hf_device_map.values()) == {"cpu", "disk"}
    codes, reconstructions, samples = expected
    with torch.no_grad():
        assert torch.equal(offloaded.vae.encode(images).codes, codes)
        assert torch.equal(offloaded.vae.decode_codes(codes).sample, reconstructions)
    assert torch.equal(sample(offloaded).codes, samples.codes)


def test_diffusers_distributes_a_pipeline(tmp_path):
    pipe = DQPipeline(make_vae(), make_transformer())
    pipe.save_pretrained(tmp_path)
    balanced = DQPipeline.from_pretrained(tmp_path, device_map="balanced")
    drawn = [each(generator=seeded()).codes for each in (pipe, balanced)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_a_model_wholly_on_disk_gives_the_same(folder, images, expected, tmp_path, part):
    model_class = {"vae": DQVAEModel, "transformer": DQTransformerForImageGeneration}[part]
    model = model_class.from_pretrained(folder, subfolder=part, device_map={"": "disk"}, offload_folder=tmp_path)
    assert all(parameter.is_meta for parameter in model.parameters())
    if part == "transformer":
        assert torch.equal(sample(model).codes, expected[2].codes)
    else:
        with torch.no_grad():
            assert torch.equal(model.encode(images).codes, expected[0])
            assert torch.equal(model.decode_codes(expected[0]).sample, expected[1])


def test_cpu_offload_brings_each_model_to_the_device_in_turn_and_both_back(folder):
    pipe = DQPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(class_labels=["sun"], generator=seeded())
    pipe.enable_model_cpu_offload(device="cpu")  # to work on "cpu:0" and rest on "cpu", both names of one device
    assert pipe.vae._hf_hook.prev_module_hook.model is pipe.transformer  # which makes room when the other comes
    moves, models = [], {name: model for name, model in pipe.components.items() if model is not None}
    for name, model in models.items():

        def to(device, move=model.to, name=name):
            moves.append((name, str(device)))
            return move(device)

        model.to = to
    got = pipe(class_labels=["sun"], generator=seeded())
    assert moves == [("transformer", "cpu:0"), ("vae", "cpu:0")]
    for model in models.values():
        assert {parameter.device for parameter in model.parameters()} == {torch.device("cpu")}  # they rest again
    assert torch.equal(got.codes, expected.codes) and got.images[0].tobytes() == expected.images[0].tobytes()


# Attention


def toy_batch():
    grain_map = torch.tensor([0, 1, 1, 0]).repeat(2, 4).view(2, 4, 4)
    codes = torch.randint(16, (2, 4, 4), generator=seeded()).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return codes, grain_map, torch.tensor([0, 2])


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations_give_the_same_logits_and_samples(folder, expected, attention):
    loaded = DQForImageGeneration.from_pretrained(folder, attn_implementation=attention)
    configs = (loaded.config, *(part.config for part in (loaded.vae, loaded.transformer)))
    assert [config._attn_implementation for config in configs] == [attention] * 3
    reference = make_transformer(num_classes=3, class_dropout=0.2)
    reference.set_attn_implementation("eager")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # flex attention without a C++ compiler
        got, wanted = loaded.transformer(*toy_batch()), reference(*toy_batch())
        samples = sample(loaded)
    torch.testing.assert_close(got.content_logits, wanted.content_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.position_logits, wanted.position_logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(samples.codes, expected[2].codes) and torch.equal(samples.grain_map, expected[2].grain_map)


# Gradient checkpointing


@pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing_enable:FutureWarning"
)  # the older name works in all versions
@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_gradient_checkpointing_gives_the_same_loss_and_gradients_with_dropout(images, part):
    results = []
    for checkpointing in (False, True):
        model = make_vae(router="feature", dropout=0.2) if part == "vae" else make_transformer(num_classes=3)
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        torch.manual_seed(0)
        output = model.train()(*([images] if part == "vae" else toy_batch()))
        output.loss.backward()
        codebook = [model.quantizer.codebook] if part == "vae" else []
        results.append([output.loss.detach(), *(parameter.grad for parameter in model.parameters()), *codebook])
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)


def test_attention_in_float64_is_exact_to_its_last_digits():
    """The entropy coder of the generator's probabilities relies on it, on two ways to the same numbers."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 40, 8, dtype=torch.float64, generator=generator)
    output, _ = eager_attention_forward(torch.nn.Identity(), query, key, value, None, scaling=0.5)
    scores = (query @ key.transpose(2, 3) * 0.5).exp()
    expected = (scores / scores.sum(-1, keepdim=True)) @ value
    assert (output.transpose(1, 2) - expected).abs().max() < 1e-13


# What a seed promises


@pytest.fixture
def thread_counts():
    """1, 2 and 3; afterwards it is as it was."""
    before = torch.get_num_threads()
    yield (1, 2, 3)
    torch.set_num_threads(before)


def test_a_seed_gives_the_same_codes_with_any_number_of_threads(folder, thread_counts):
    model, results = DQForImageGeneration.from_pretrained(folder), []
    for count in thread_counts:
        torch.set_num_threads(count)
        results.append(sample(model))
    for result in results[1:]:
        assert torch.equal(result.codes, results[0].codes)
        torch.testing.assert_close(result.pixel_values, results[0].pixel_values, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_seed_gives_the_same_image_again_in_every_dtype_mode_and_api(folder, dtype):
    model = DQForImageGeneration.from_pretrained(folder, dtype=dtype)
    pipe = DQPipeline(vae=model.vae, transformer=model.transformer)
    pipe.set_progress_bar_config(disable=True)
    expected = sample(model)
    with torch.inference_mode():
        assert_same_image(sample(model), expected)
    assert_same_image(sample(model.train()), expected)
    codes = pipe(class_labels=[0, 1, 2], generator=seeded(), guidance_scale=2.0, output_type="codes").codes
    assert torch.equal(codes, expected.codes)


def test_a_seed_gives_one_image_under_autocast(folder):
    model = DQForImageGeneration.from_pretrained(folder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_image(sample(model), sample(model))
        codes = model.transformer.generate([0, 1, 2], generator=seeded(), guidance_scale=2.0).codes
        assert torch.equal(codes, sample(model).codes)


def assert_same_image(actual, expected):
    assert torch.equal(actual.codes, expected.codes) and torch.equal(actual.pixel_values, expected.pixel_values)
