"""The image tokenizer outside of Python: torch.export and ONNX."""

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import make_vae
from torch import nn


class Encoding(nn.Module):
    """Images to codes and grain map."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, pixel_values):
        return self.vae.encode(pixel_values, return_dict=False)[:2]


class Decoding(nn.Module):
    """Codes to images."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, codes):
        return self.vae.decode_codes(codes, return_dict=False)


ROUTERS = {"entropy": dict(router="entropy", entropy_thresholds=[1.0]), "feature": dict(router="feature")}


def images(number=2):
    return torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_an_exported_tokenizer_gives_the_same_for_any_number_of_images(router):
    vae = make_vae(**ROUTERS[router])
    codes, grain_map = Encoding(vae)(images(5))
    encoding = torch.export.export(Encoding(vae), (images(),), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    exported_codes, exported_map = encoding(images(5))
    assert torch.equal(exported_codes, codes) and torch.equal(exported_map, grain_map)
    decoding = torch.export.export(Decoding(vae), (codes[:2],), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    torch.testing.assert_close(decoding(codes), Decoding(vae)(codes))


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTERS)
@torch.no_grad()
def test_each_part_of_a_tokenizer_gives_the_same_in_onnx(router, tmp_path):
    vae = make_vae(**ROUTERS[router])
    features = vae.encoder(images())
    encoded = vae.encode(images())
    parts = {  # module, arguments, and what of its results is compared
        "encoder": (vae.encoder, (images(),), features),
        "router": (Routing(vae.router), (images(), features), vae.router(images(), features).grain_map),
        "quantizer": (Quantizing(vae), (encoded.hidden_states,), vae.quantizer.nearest(vectors(vae, encoded))),
        "decoder": (vae.decoder, (vae.post_quant_conv(encoded.quantized),), vae.decode(encoded.quantized).sample),
    }
    for name, (part, arguments, expected) in parts.items():
        path = tmp_path / f"{name}.onnx"
        torch.onnx.export(part.eval(), arguments, path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path)
        flat = [value for each in arguments for value in (each if isinstance(each, list) else [each])]
        inputs = [entry.name for entry in session.get_inputs()]
        kept = flat if len(inputs) == len(flat) else flat[: len(inputs)]  # an entropy router looks at no features
        results = session.run(None, {entry: value.numpy() for entry, value in zip(inputs, kept)})
        for result, value in zip(results, expected if isinstance(expected, list) else [expected], strict=True):
            np.testing.assert_allclose(result, value.numpy(), atol=1e-5, err_msg=name)


class Routing(nn.Module):
    """Images and features to a grain map."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, pixel_values, features):
        return self.router(pixel_values, features).grain_map


class Quantizing(nn.Module):
    """Routed features to the codes of all cells."""

    def __init__(self, vae):
        super().__init__()
        self.project, self.quantizer = vae.quant_conv, vae.quantizer

    def forward(self, hidden_states):
        return self.quantizer.nearest(self.project(hidden_states).permute(0, 2, 3, 1).flatten(0, 2))


def vectors(vae, encoded):
    return vae.quant_conv(encoded.hidden_states).permute(0, 2, 3, 1).flatten(0, 2)
