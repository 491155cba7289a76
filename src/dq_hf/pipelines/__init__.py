"""The two ways to images: `DQPipeline` (diffusers) and `DQGenerationPipeline` (transformers)."""
