"""Where a model computes the ops of this plugin: one recogniser a family, proved by the core."""
