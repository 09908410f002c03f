"""CPUs for KernelPyTorch. `kpt_plugin_cpu.plugin` names what there is; the rest is imported on use."""
