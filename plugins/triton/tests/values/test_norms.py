"""Norms against fp64: values, gradients, layouts, sizes."""

from __future__ import annotations

import pytest
import torch
from triton_suite import TritonSuite

import kpt_plugin_triton.plugin as plugin
from kpt_plugin_triton import norms
from kpt_plugin_triton.checks import KernelInputError

KERNELS = {spec.op: spec for spec in plugin.kpt_kernels()}


class TestRmsNorm(TritonSuite):
    kernel = KERNELS["rms_norm"]


class TestAddRmsNorm(TritonSuite):
    kernel = KERNELS["add_rms_norm"]


class TestLayerNorm(TritonSuite):
    kernel = KERNELS["layer_norm"]


class TestAddLayerNorm(TritonSuite):
    kernel = KERNELS["add_layer_norm"]

    def arguments(self):
        generator = torch.Generator(self.device).manual_seed(0)
        x, residual = (torch.randn(3, 5, 40, generator=generator, device=self.device) for _ in range(2))
        weight, bias = (torch.randn(40, generator=generator, device=self.device) for _ in range(2))
        return {"x": x, "residual": residual, "weight": weight, "bias": bias, "eps": 1e-5}

    def reference(self):
        from kpt_plugin_triton.references.norms import add_layer_norm

        return add_layer_norm
