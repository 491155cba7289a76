"""Saved folders, model cards, exported code and the Hub; imports nothing of dq_hf but itself."""

from .configuration import ConfigHubMixin
from .mixins import HubMixin, ProcessorHubMixin, load_model

__all__ = ["ConfigHubMixin", "HubMixin", "ProcessorHubMixin", "load_model"]
