"""What transformers, and what is built on it, does with any of its models: make, probe, train, evaluate and go on."""

import copy

import pytest
import torch
from conftest import make_transformer, make_vae
from transformers import AutoModel, Trainer, TrainingArguments

from dq_hf import DQConfig, DQForImageGeneration, DQTransformerConfig, DQTransformerForImageGeneration, DQVAEModel

LOW_AND_HIGH = (torch.bfloat16, torch.float16, torch.float64)


def both():
    return DQForImageGeneration.from_models(make_vae(), make_transformer())


def inputs_of(model, images=2):
    """Arguments of `forward` for a model of `conftest`."""
    pixel_values = torch.rand(images, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    if not isinstance(model, DQTransformerForImageGeneration):
        return {"pixel_values": pixel_values}
    encoded = make_vae().encode(pixel_values)
    return {"codes": encoded.codes, "grain_map": encoded.grain_map}


def assert_new(quantizer):
    """A codebook is float32, normally distributed, and its averages are those of codes that were used once each."""
    values = dict(quantizer.named_buffers())
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert 0.7 < quantizer.codebook.std() < 1.3 and abs(quantizer.codebook.mean()) < 0.3
    assert torch.equal(quantizer.embed_sum, quantizer.codebook) and (quantizer.cluster_size == 1).all()


@pytest.mark.parametrize("router", ["entropy", "feature", "random"])
def test_a_model_made_without_memory_is_initialised_when_it_has_some(router):
    config = DQConfig(vae_config=make_vae(router=router).config, transformer_config=make_transformer().config)
    with torch.device("meta"):
        model = DQForImageGeneration(config)
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(torch.nan)
    model.init_weights()
    assert_new(model.vae.quantizer)
    expected = make_vae(router=router).router.thresholds
    assert torch.equal(model.vae.router.thresholds, expected)
    weights = {name: value for name, value in model.state_dict().items() if not name.endswith("thresholds")}
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("dtype", LOW_AND_HIGH)
def test_the_codebook_is_float32_however_a_model_is_made_in_another_dtype(dtype, tmp_path):
    model = make_vae()
    config = copy.deepcopy(model.config)
    torch.set_default_dtype(dtype)
    try:
        assert_new(DQVAEModel(config).quantizer)
    finally:
        torch.set_default_dtype(torch.float32)
    made = AutoModel.from_config(config, dtype=dtype)
    assert_new(made.quantizer)
    assert made.quant_conv.weight.dtype == dtype and made.router.thresholds.dtype == torch.float32
    model.save_pretrained(tmp_path)
    loaded = DQVAEModel.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.quantizer.codebook.dtype == loaded.router.thresholds.dtype == torch.float32
    assert torch.equal(loaded.quantizer.codebook, model.quantizer.codebook)


def test_a_codebook_that_is_there_stays_when_weights_are_initialised():
    model = make_vae()
    codebook = model.quantizer.codebook.clone()
    model.init_weights()
    assert torch.equal(model.quantizer.codebook, codebook)


@pytest.mark.parametrize("make", [make_vae, make_transformer, both])
def test_outputs_on_request(make):
    model = make()
    inputs = inputs_of(model)
    with torch.no_grad():
        plain = model(**inputs)
        as_tuple = model(**inputs, return_dict=False)
        probed = model(**inputs, output_hidden_states=True)
        model.config.output_hidden_states = True
        by_config = model(**inputs) if make is not both else probed
    assert "hidden_states" not in plain and "attentions" not in plain
    assert isinstance(as_tuple, tuple) and as_tuple[0] == plain.loss and len(as_tuple) == len(plain)
    inner = model.transformer if make is both else model
    assert len(probed.hidden_states) == len(by_config.hidden_states) == inner.config.num_hidden_layers + 1
    assert probed.loss == plain.loss
    assert "loss" not in model(**inputs, return_loss=False)
    with pytest.raises(TypeError, match="output_hiden_states"):
        model(**inputs, output_hiden_states=True)


def test_hidden_states_are_what_goes_through_the_layers():
    model, seen = make_transformer(), []
    for layer in [*model.position_transformer.layers, *model.content_transformer.layers]:
        layer.register_forward_hook(lambda _, __, output: seen.append(output))
    model.position_transformer.layers[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    hidden_states = model(**inputs_of(model), output_hidden_states=True).hidden_states
    assert all(map(torch.equal, hidden_states, seen)) and len(seen) == 5


def test_attention_weights_are_those_of_a_softmax_over_what_came_before():
    model, inputs = make_transformer(), inputs_of(make_transformer())
    plain = model(**inputs)
    given = model(**inputs, output_attentions=True)
    assert torch.equal(given.content_logits, plain.content_logits)
    model.set_attn_implementation("eager")
    eager = model(**inputs, output_attentions=True)
    assert len(given.attentions) == len(eager.attentions) == model.config.num_hidden_layers
    for weights, expected in zip(given.attentions, eager.attentions):
        torch.testing.assert_close(weights, expected)
        assert (weights.triu(1) == 0).all()
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert model(**inputs).attentions is None
    with pytest.raises(ValueError, match="a tokenizer gives no attention weights"):
        make_vae()(**inputs_of(make_vae()), output_attentions=True)


def test_encoding_and_decoding_give_tuples_on_request():
    vae = make_vae()
    encoded = vae.encode(**inputs_of(vae))
    assert torch.equal(vae.encode(**inputs_of(vae), return_dict=False)[0], encoded.codes)
    (sample,) = vae.decode(vae.quantizer.lookup(encoded.codes), return_dict=False)
    assert torch.equal(sample, vae.decode_codes(encoded.codes, return_dict=False)[0])


def test_names_that_transformers_gives_every_configuration_and_model():
    config = make_transformer(num_classes=3).config
    config.num_labels = 5
    config.validate()
    assert config.num_classes == config.num_labels == 5 and config.label2id["LABEL_4"] == 4
    assert DQTransformerConfig(num_labels=4).num_classes == 4
    with pytest.raises(ValueError, match="num_labels is num_classes, 3; got 4"):
        DQTransformerConfig(num_classes=3, num_labels=4)
    assert config.num_hidden_layers == 4 and config.max_position_embeddings == config.max_stream_length
    assert config.vocab_size == config.codebook_size + 2 + 5
    for name in ("num_hidden_layers", "vocab_size"):
        with pytest.raises(NotImplementedError, match="set "):
            setattr(config, name, 1)
    joined = DQConfig(vae_config=make_vae().config, transformer_config=config)
    joined.num_labels = 2
    joined.validate()
    assert joined.transformer_config.num_classes == 2 and joined.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    for model in (make_transformer(), both()):
        table = torch.nn.Embedding(19, 16)
        model.set_input_embeddings(table)
        assert model.get_input_embeddings() is table
    assert make_vae().get_input_embeddings().in_channels == 3


@pytest.mark.parametrize("make", [make_vae, make_transformer, both])
def test_trainer_trains_evaluates_predicts_resumes_and_reloads(make, tmp_path):
    def trainer(steps=2):
        torch.manual_seed(0)
        model = make()
        columns = inputs_of(model, images=4)
        rows = [{name: values[i] for name, values in columns.items()} for i in range(4)]
        arguments = TrainingArguments(
            str(tmp_path / "run"),
            max_steps=steps,
            per_device_train_batch_size=2,
            save_steps=1,
            label_names=[],
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)

    run = trainer()
    run.train()
    assert run.evaluate()["eval_loss"] > 0
    assert len(run.predict(run.eval_dataset).predictions[0]) == 4
    run.save_model(tmp_path / "final")
    weights = run.model.state_dict()
    for model in (
        type(run.model).from_pretrained(tmp_path / "final"),
        AutoModel.from_pretrained(tmp_path / "run/checkpoint-2"),
    ):
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    resumed = trainer()
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.zero_()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    assert all(torch.equal(value, weights[name]) for name, value in resumed.model.state_dict().items())
