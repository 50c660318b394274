"""Ops on tensors. They know nothing of transformers, modules or recipes."""
