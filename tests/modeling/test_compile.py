"""torch.compile takes encode, decode and the step of sampling whole, and changes no code.

Without a C++ compiler: the graphs run in PyTorch, which is enough to show that they are whole and right.
"""

import pytest
import torch
from conftest import make_transformer, make_vae, seeded
from transformers import CompileConfig

from dq_hf import DQForImageGeneration, DQGenerationPipeline, DQPipeline


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()


class Backend:
    """Runs the graphs that it gets as they are, and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward

    def __deepcopy__(self, memo):
        return self


def config(backend):
    return CompileConfig(backend=backend, mode="default", fullgraph=True)


@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("entropy", {}),
        ("feature", {"fine_ratio": 0.5}),
        ("feature", {"grain_map": torch.arange(32).view(2, 4, 4) % 2}),
    ],
)
def test_encoding_is_one_graph_and_gives_the_same_codes(router, options):
    vae, images = make_vae(router=router), torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1
    compiled = torch.compile(vae.encode, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected, got = vae.encode(images, **options), compiled(images, **options)
    assert torch.equal(got.codes, expected.codes) and torch.equal(got.grain_map, expected.grain_map)
    torch.testing.assert_close(got.quantized, expected.quantized)
    torch.testing.assert_close(got.loss, expected.loss)


def test_decoding_is_one_graph_and_gives_the_same_images(tiny_vae):
    codes = torch.randint(16, (2, 8, 8), generator=seeded())
    with torch.no_grad():
        expected = tiny_vae.decode_codes(codes).sample
        got = torch.compile(tiny_vae.decode_codes, fullgraph=True, backend="aot_eager")(codes).sample
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(class_labels=[0, 1, 2], guidance_scale=2.0, temperature=0.8, top_k=12, top_p=0.9),
        dict(class_labels=[0, 1], fine_positions="free", do_sample=False),
    ],
)
def test_all_steps_of_all_calls_share_one_graph_and_give_the_same_codes(options):
    model = make_transformer(num_classes=3, class_dropout=0.2, num_position_layers=1, num_content_layers=1)
    backend = Backend()
    for seed in (0, 1):
        expected = model.generate(generator=seeded(seed), **options)
        got = model.generate(generator=seeded(seed), compile_config=config(backend), **options)
        assert torch.equal(got.contents, expected.contents) and torch.equal(got.positions, expected.positions)
        assert torch.equal(got.codes, expected.codes) and torch.equal(got.grain_map, expected.grain_map)
    assert len(backend.graphs) == 1


def test_a_prefix_is_read_before_the_compiled_steps():
    sizes = dict(num_position_layers=1, num_content_layers=1, text_hidden_size=6, text_length=3)
    model = make_transformer(grid_sizes=[[2, 2], [4, 4]], **sizes)
    options = dict(encoder_hidden_states=torch.randn(2, 3, 6, generator=seeded()), guidance_scale=2.0)
    expected = model.generate(generator=seeded(), **options)
    got = model.generate(generator=seeded(), compile_config=config(Backend()), **options)
    assert torch.equal(got.contents, expected.contents) and torch.equal(got.positions, expected.positions)


def test_the_step_gives_the_same_codes_in_functional_form():
    model = make_transformer(grid_sizes=[[2, 2], [4, 4]], num_position_layers=1, num_content_layers=1)
    model.set_attn_implementation("eager")
    expected = model.generate(num_images=2, generator=seeded())
    got = model.generate(num_images=2, generator=seeded(), compile_config=config("aot_eager"))
    assert torch.equal(got.contents, expected.contents) and torch.equal(got.positions, expected.positions)


def test_both_pipelines_compile_on_request_and_give_the_same_image(tiny_vae):
    transformer = make_transformer(num_position_layers=1, num_content_layers=1)
    pipe = DQPipeline(vae=tiny_vae, transformer=transformer)
    pipe.set_progress_bar_config(disable=True)
    task = DQGenerationPipeline(DQForImageGeneration.from_models(tiny_vae, transformer))
    backend = Backend()
    expected = pipe(generator=seeded(7))
    got = pipe(generator=seeded(7), compile_config=config(backend))
    assert torch.equal(got.codes, expected.codes) and got.images[0].tobytes() == expected.images[0].tobytes()
    assert task(seed=7, compile_config=config(backend))["image"].tobytes() == expected.images[0].tobytes()
    assert len(backend.graphs) == 1


def test_another_compile_config_and_flash_attention_are_refused(tiny_transformer):
    with pytest.raises(TypeError, match="compile_config must be a transformers.CompileConfig, got True"):
        tiny_transformer.generate(compile_config=True)
    model = make_transformer()
    model.config._attn_implementation_internal = "flash_attention_2"  # loading with it needs the package
    with pytest.raises(ValueError, match="not work with attn_implementation 'flash_attention_2'; load .* \"sdpa\""):
        model.generate(compile_config=CompileConfig())
