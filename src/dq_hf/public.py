"""The public classes, registered: transformers' Auto classes and task "dq-generation", and diffusers, find them."""

import diffusers
from transformers import AutoConfig, AutoModel

# By its module: transformers 5.17 hides the name where torchvision is missing, which this class does not need.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .assets import DEFAULT_MODEL
from .modeling.configuration_dq import DQConfig
from .modeling.configuration_dqtransformer import DQTransformerConfig
from .modeling.configuration_dqvae import DQVAEConfig
from .modeling.image_processing_dq import DQImageProcessor
from .modeling.modeling_dq import DQForImageGeneration
from .modeling.modeling_dqtransformer import DQTransformerForImageGeneration
from .modeling.modeling_dqvae import DQVAEModel
from .pipelines.image_generation import DQGenerationPipeline
from .pipelines.inpaint import DQInpaintPipeline  # noqa: F401, one of the public classes
from .pipelines.pipeline_dq import DQPipeline

for config_class, model_class in (
    (DQVAEConfig, DQVAEModel),
    (DQTransformerConfig, DQTransformerForImageGeneration),
    (DQConfig, DQForImageGeneration),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)  # transformers has no Auto class for image generation
AutoImageProcessor.register(DQConfig, slow_image_processor_class=DQImageProcessor, exist_ok=True)
AutoImageProcessor.register(DQVAEConfig, slow_image_processor_class=DQImageProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    "dq-generation",
    pipeline_class=DQGenerationPipeline,
    pt_model=AutoModel,
    default={"model": (DEFAULT_MODEL, None)},
    type="image",
)
diffusers.DQPipeline = DQPipeline  # where DiffusionPipeline.from_pretrained looks for the class that a folder names
