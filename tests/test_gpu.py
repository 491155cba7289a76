"""Everything where a device matters, on one GPU: `pytest -n 0 -m gpu`. On a CPU what can run there: `DQ_TEST_DEVICE=cpu`."""

import importlib.util
import os
from contextlib import contextmanager, nullcontext

import pytest
import torch
from conftest import make_transformer, make_vae, seeded
from transformers import CompileConfig

from dq_hf import DQForImageGeneration, DQImageProcessor, DQInpaintPipeline, DQPipeline
from dq_hf.codec import DQTokens, compress, decompress, read_codes
from dq_hf.metrics.psnr import psnr
from dq_hf.modeling.conditioning_dq import class_condition
from dq_hf.modeling.constraints_dq import StreamState
from dq_hf.pictures import draw_generation, draw_grain_map

pytestmark = pytest.mark.gpu

DEVICE = torch.device(os.environ.get("DQ_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
FLASH = ["flash_attention_2"] if ON_GPU and importlib.util.find_spec("flash_attn") else []
CLASSES = dict(num_classes=3, class_dropout=0.2)


def both(**vae):
    return DQForImageGeneration.from_models(make_vae(**vae), make_transformer(**CLASSES))


def images(number=4):
    return torch.rand(number, 3, 16, 16, generator=seeded()) * 2 - 1


@contextmanager
def no_waiting():
    """An operation that waits for the GPU is an error; a CPU has none."""
    if not ON_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("router", ["entropy", "feature", "random"])
def test_codes_are_those_of_the_cpu(router, monkeypatch):
    # The CPU rounds no input of a convolution to 10 bits.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vae = make_vae(router=router)
    with torch.no_grad():
        expected = vae.encode(images())
        vae.to(DEVICE)
        encoded = vae.encode(images().to(DEVICE))
        same = (encoded.codes.cpu() == expected.codes).float().mean()
        assert same > 0.98 and torch.equal(encoded.grain_map.cpu(), expected.grain_map)
        decoded = vae.decode_codes(expected.codes).sample  # codes may lie on the CPU
    assert decoded.device.type == DEVICE.type
    torch.testing.assert_close(decoded.cpu(), vae.cpu().decode_codes(expected.codes).sample, atol=1e-3, rtol=0)


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 2.0}, {"do_sample": False}, {"fine_positions": "free"}])
def test_a_seed_draws_the_codes_of_the_cpu(options):
    model = make_transformer(**CLASSES)
    drawn = [model.to(device).generate([0, 1, 2], generator=seeded(), **options) for device in ("cpu", DEVICE)]
    for name in ("contents", "positions", "codes", "grain_map", "lengths"):
        assert torch.equal(drawn[0][name], drawn[1][name].cpu()), name


def test_a_generator_may_be_on_the_device():
    model = make_transformer(**CLASSES).to(DEVICE)
    generators = [torch.Generator(DEVICE).manual_seed(3) for _ in range(2)]
    assert torch.equal(*(model.generate([1], generator=generator).codes for generator in generators))


@pytest.mark.parametrize("router", ["entropy", "feature"])
def test_a_training_step_of_the_tokenizer_in_bfloat16(router):
    vae = make_vae(router=router).to(DEVICE).train()
    codebook = vae.quantizer.codebook.clone()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        output = vae(images().to(DEVICE))
    output.loss.backward()
    assert output.loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in vae.parameters())
    assert not torch.equal(vae.quantizer.codebook, codebook) and vae.quantizer.codebook.dtype == torch.float32


def test_a_training_step_of_the_generator_in_bfloat16_is_near_that_in_float32():
    model, encoded = make_transformer(**CLASSES).to(DEVICE), make_vae().encode(images())
    losses = []
    for context in (nullcontext(), torch.autocast(DEVICE.type, dtype=torch.bfloat16)):
        with context:
            loss = model(encoded.codes, encoded.grain_map, [0, 1, 2, 0]).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, atol=0.1, rtol=0.05)
    model.zero_grad()
    model.train()(encoded.codes, encoded.grain_map, [0, 1, 2, 0]).loss.backward()  # hides classes, drops out


def test_log_probabilities_are_those_of_the_cpu():
    model, encoded = make_transformer(**CLASSES), make_vae().encode(images())
    with torch.no_grad():
        nats = [
            model.to(device).log_prob(encoded.codes, encoded.grain_map, [0, 1, 2, 0]).nats.cpu()
            for device in ("cpu", DEVICE)
        ]
    torch.testing.assert_close(*nats, atol=1e-2, rtol=1e-4)


def test_the_rules_of_a_step_do_not_wait_for_the_device():
    model = make_transformer(**CLASSES).to(DEVICE)
    state = StreamState(model.layout, class_condition([0, 1, 2], 3, model.config, DEVICE).labels)
    positions = state.allowed_positions().long().argmax(1)  # makes the tables
    with no_waiting():
        for _ in range(5):
            contents = state.allowed_contents(positions).long().argmax(1)
            state.append(positions, contents)
            positions = state.allowed_positions().long().argmax(1)
    assert state.lengths.tolist() == [5, 5, 5]


def test_compiled_steps_draw_the_same_codes():
    model = make_transformer(num_position_layers=1, num_content_layers=1, **CLASSES).to(DEVICE)
    config = CompileConfig(fullgraph=True, mode="reduce-overhead") if ON_GPU else CompileConfig(backend="eager")
    expected = model.generate([0, 1], generator=seeded()).codes
    assert torch.equal(model.generate([0, 1], generator=seeded(), compile_config=config).codes, expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", *FLASH])
def test_attention_implementations_give_near_logits(implementation):
    model, encoded = make_transformer(**CLASSES).to(DEVICE, torch.bfloat16), make_vae().encode(images())
    arguments = (encoded.codes, encoded.grain_map, [0, 1, 2, 0])
    with torch.no_grad():
        expected = model(*arguments).content_logits.float()
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(model(*arguments).content_logits.float(), expected, atol=0.5, rtol=0.1)


def test_half_precision_models_and_pipelines_move_to_the_device(tmp_path):
    both().save_pretrained(tmp_path)
    pipe = DQPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16).to(DEVICE)
    assert pipe.vae.quantizer.codebook.dtype == torch.float32
    assert pipe(class_labels=[0, 1], generator=seeded(), output_type="pt").images.isfinite().all()
    if ON_GPU:
        offloaded = DQPipeline.from_pretrained(tmp_path)
        offloaded.enable_model_cpu_offload()
        expected = DQPipeline.from_pretrained(tmp_path).to(DEVICE)(class_labels=[0], generator=seeded()).images[0]
        assert offloaded(class_labels=[0], generator=seeded()).images[0].tobytes() == expected.tobytes()


def test_device_maps(tmp_path):
    both().save_pretrained(tmp_path)
    mapped = DQForImageGeneration.from_pretrained(tmp_path, device_map={"": DEVICE})
    assert {parameter.device.type for parameter in mapped.parameters()} == {DEVICE.type}
    assert mapped.generate([0], generator=seeded()).pixel_values.device.type == DEVICE.type


def test_everything_is_made_on_a_default_device():
    torch.set_default_device(DEVICE)
    try:
        model = both(router="feature")
        pixel_values = DQImageProcessor(do_resize=False)(torch.rand(2, 3, 16, 16))["pixel_values"].to(DEVICE)
        loss = model.train()(pixel_values, [0, 1]).loss
        loss.backward()
        model.vae.train()(pixel_values).loss.backward()
        codes = model.eval().generate([0, 1], generator=torch.Generator().manual_seed(0)).codes
    finally:
        torch.set_default_device(None)
    assert loss.device.type == codes.device.type == DEVICE.type


def test_metrics_take_images_where_they_are():
    values = images().to(DEVICE)
    assert psnr(values, values.clone().mul(0.9)).device.type == DEVICE.type


@pytest.mark.parametrize("options", [{}, dict(max_bytes=60), dict(prior="generator", class_label=1)])
def test_files_are_written_and_read_by_a_model_on_the_device(options):
    model, (image,) = both().to(DEVICE).eval(), DQImageProcessor().post_process(images(1))
    data = compress(model, image, **options)
    assert decompress(model, data).size == image.size
    codes, grain_map = read_codes(model, data)
    assert codes.device.type == grain_map.device.type == DEVICE.type


def test_pictures_tokens_and_edits_of_a_model_on_the_device():
    model, (image,) = both().to(DEVICE).eval(), DQImageProcessor().post_process(images(1))
    encoded = model.vae.encode(images(2).to(DEVICE))
    order = torch.arange(encoded.codes[0].numel(), device=DEVICE).view_as(encoded.codes[0]).expand_as(encoded.codes)
    processor = DQImageProcessor.for_model(model.vae.config)
    assert len(draw_generation(model.vae, processor, encoded.codes, encoded.grain_map, order, 2)) == 3
    assert draw_grain_map(image, encoded.grain_map[0]).width >= image.width
    tokens = DQTokens(model.vae.config)
    for read, codes in zip(tokens.from_tokens(tokens.to_tokens(encoded)["input_ids"].to(DEVICE)), encoded.codes):
        assert torch.equal(read["codes"][0], codes.cpu())
    pipe = DQInpaintPipeline(model.vae, model.transformer)
    pipe.set_progress_bar_config(disable=True)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:8] = True
    output = pipe(class_labels=1, image=image, mask_image=mask.to(DEVICE), num_candidates=2)
    assert output.images[0].size == image.size and output.codes.device.type == DEVICE.type
