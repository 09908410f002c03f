"""The ops: one file a family, each with its references, its specs and its recogniser."""
