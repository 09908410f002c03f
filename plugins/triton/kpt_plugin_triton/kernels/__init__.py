"""The device code, one file an op family: nothing here knows about autograd or dispatch."""
