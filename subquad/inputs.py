"""What a run reads: the teacher, its tokenizer, and the text."""

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedConfig, PreTrainedModel

from subquad.distill.data import Document, Tokens, hold_out, load_documents
from subquad.errors import UserError
from subquad.linearize.teacher import load_config, load_teacher, load_tokenizer
from subquad.recipe import DataSection, Recipe
from subquad.smoke import shrink_config, shrink_model, shrink_texts


class Teacher:
    """The recipe's teacher, shrunken for a smoke run. Every `fresh()` is its own copy of the weights."""

    def __init__(self, recipe: Recipe, smoke: bool = False):
        self.recipe, self.smoke = recipe, smoke
        self._opened: PreTrainedModel | None = None

    @cached_property
    def config(self) -> PreTrainedConfig:
        """Read without weights; its dtype is the one the recipe runs in, so that the plan counts the bytes of this run."""
        config = load_config(self.recipe.teacher, revision=self.recipe.revision)
        if self.recipe.dtype != "auto":
            config.dtype = getattr(torch, self.recipe.dtype)
        return shrink_config(config) if self.smoke else config

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.recipe.teacher, revision=self.recipe.revision)

    def open(self) -> PreTrainedModel:
        """Read the weights now; the next `fresh()` hands out this model."""
        self._opened = self.fresh()
        return self._opened

    def fresh(self) -> PreTrainedModel:
        """A teacher nobody else holds, in eval mode."""
        if self._opened is not None:
            model, self._opened = self._opened, None
            return model
        return copy.deepcopy(self._small) if self.smoke else self._open()

    @cached_property
    def _small(self) -> PreTrainedModel:
        return shrink_model(self._open())

    def _open(self) -> PreTrainedModel:
        return load_teacher(self.recipe.teacher, dtype=self.recipe.dtype, revision=self.recipe.revision)[0]


@dataclass(frozen=True)
class Text:
    """Token ids to train on and, never mixed with them, to judge on."""

    train: Tokens
    held_out: Tokens
    overlap: tuple[dict[str, Any], ...] = ()  # of training text and what is judged on (leakage.py)


def read_documents(data: DataSection, smoke: bool = False) -> tuple[list[Document], list[Document]]:
    """(to train on, held out). Without `data.eval` the last share of the training text is held out."""
    documents = load_documents(data.train)
    train, held_out = (documents, load_documents(data.eval)) if data.eval is not None else hold_out(documents, share=data.hold_out)
    return (shrink_texts(train), shrink_texts(held_out)) if smoke else (train, held_out)


def prompt_ids(tokenizer: Any, prompt: str) -> BatchEncoding:
    """input_ids [1, T] and attention_mask of a prompt, in the model's chat format when it has one. UserError for a prompt without tokens."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = tokenizer(prompt, return_tensors="pt")
    if not ids["input_ids"].numel():
        raise UserError(f"The prompt {prompt!r} has no tokens, so there is nothing to continue. Give at least one word.")
    return ids
