"""AMD GPUs, as torch's ROCm build shows them."""
