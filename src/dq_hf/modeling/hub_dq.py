"""Folders, cards and the Hub: the care of `dq_hf.hub` where dq_hf is installed, else what transformers does by itself.

The only module here that knows of dq_hf, because these modules travel with a model to places where it may be missing.
"""

try:
    from dq_hf.hub.configuration import ConfigHubMixin
    from dq_hf.hub.mixins import HubMixin, ProcessorHubMixin, load_model
except ModuleNotFoundError as error:
    if error.name not in (None, "dq_hf", "dq_hf.hub"):  # dq_hf is there, and something that it needs is not
        raise

    def load_model(model_class, load, source, *args, **kwargs):
        """The model and the loading information that transformers' `load` gives; weights that do not fit are an error."""
        model, info = load(source, *args, output_loading_info=True, **kwargs)
        if wrong := sorted({*info.get("missing_keys", ()), *info.get("unexpected_keys", ())}):
            raise ValueError(
                f"{source} does not fit {model_class.__name__}: missing or unknown are {', '.join(wrong[:8])}"
            )
        return model, info

    class HubMixin:
        """Stands before `PreTrainedModel`: weights that are missing or of another shape are an error."""

        @classmethod
        def from_pretrained(cls, source, *args, output_loading_info=False, **kwargs):
            model, info = load_model(cls, super().from_pretrained, source, *args, **kwargs)
            return (model, info) if output_loading_info else model

    class ConfigHubMixin:
        """Stands before `PreTrainedConfig`."""

        def check_entries(self, entries):
            """Nothing: as transformers does."""

    class ProcessorHubMixin:
        """Stands before `BaseImageProcessor`."""


def without_remote_code(entries):
    """A file's entries as the package reads them: its own classes need no code from there, and no trust."""
    remote = ("auto_map", "custom_pipelines") if __name__.startswith("dq_hf.") else ()
    return {key: value for key, value in entries.items() if key not in remote}
