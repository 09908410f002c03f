"""OpenVINO for KernelPyTorch. `kpt_plugin_openvino.plugin` names what there is; all else is loaded on use."""
