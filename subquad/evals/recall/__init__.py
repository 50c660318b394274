"""Recall and length: generated texts with an answer that stands far back. Seeded, any length, measured in the model's own tokens.

items.py makes the texts, tasks.py asks the models.
"""
