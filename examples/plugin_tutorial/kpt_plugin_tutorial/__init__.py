"""A kernel and a pass: the plugin that docs/writing-a-plugin.md builds."""
