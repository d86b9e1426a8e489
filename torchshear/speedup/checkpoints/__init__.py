"""Checkpoints of shrunk models: loaded into a model, or shrunk on disk without one."""
