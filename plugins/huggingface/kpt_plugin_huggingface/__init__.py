"""Hugging Face models for KernelPyTorch. `kpt_plugin_huggingface.plugin` names the adapter."""
