"""The page of `dq-hf demo` as a Space of the Hugging Face Hub; docs/demo.md says how to push it.

The Space's variable MODEL names another model: a Hub id, or a folder beside this file.
"""

import os

import torch

from dq_hf import DEFAULT_MODEL
from dq_hf.demo.page import serve

serve(
    os.environ.get("MODEL", DEFAULT_MODEL),
    device="cuda" if torch.cuda.is_available() else "cpu",
    host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),
    port=int(os.environ.get("GRADIO_SERVER_PORT", 7860)),
)
