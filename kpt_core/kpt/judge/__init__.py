"""The referee and the clock: how inputs are drawn, outputs poisoned and compared, and calls timed.

A leaf of the core: it knows tensors and callables, nothing of plugins, plans or receipts. Import what
you need from the modules of this package; they import torch, this one does not.
"""
