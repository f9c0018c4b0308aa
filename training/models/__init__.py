"""Models and how they compute: GPT-2, transformers models, LoRA, kernels, and text generation."""
