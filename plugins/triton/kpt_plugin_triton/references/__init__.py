"""What the plugin's own ops compute, in plain PyTorch that runs in fp64."""
