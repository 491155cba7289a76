"""What `--compile` compiles of a generator: blocks, in place."""

from functools import partial

import torch
from conftest import make_text_encoder, make_transformer

from dq_hf.training.generator import compile_blocks
from dq_hf.training.text import GeneratorWithText


def test_blocks_are_compiled_in_place_and_weights_keep_their_names():
    model = GeneratorWithText(make_transformer(), make_text_encoder())
    names = list(model.state_dict())
    compile_blocks(model)
    compiled = {type(module).__name__ for module in model.modules() if module._compiled_call_impl is not None}
    assert compiled >= {"DQTransformerLayer", "CLIPEncoderLayer"} and not compiled & {
        type(model).__name__,
        "CLIPTextModel",
    }
    assert list(model.state_dict()) == names


def test_one_graph_does_for_all_layers_and_streams_of_any_length(monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    no_dropout = dict(embedding_dropout=0.0, residual_dropout=0.0, attention_dropout=0.0)
    model, plain = (make_transformer(**no_dropout).train() for _ in range(2))
    compile_blocks(model)
    codes = torch.arange(16).view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)[None]
    try:
        for fine in (0, 3, 16):
            grain_map = (torch.arange(16) < fine).long().view(1, 4, 4)
            assert model(codes, grain_map).loss.item() == plain(codes, grain_map).loss.item()
    finally:
        torch._dynamo.reset()
    assert len(graphs) == 1
