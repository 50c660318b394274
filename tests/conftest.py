"""Fixtures every test can ask for. No network, one thread (two test processes share two cores), fixed seeds."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import helpers
import pytest
import torch

import subquad  # noqa: F401 - registers students with transformers' auto classes

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama():
    """Random llama: 3 layers, 4 query heads on 2 key/value heads, 257 tokens."""
    return helpers.tiny_model()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """One token a byte."""
    return helpers.tiny_tokenizer()


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """tiny_llama and tiny_tokenizer saved as a folder."""
    return helpers.save_teacher(tmp_path_factory.mktemp("teacher") / "tiny-llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A few thousand words in a file."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(helpers.words(2000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus():
    """The folder of public texts used in development; tests that need it are skipped where it is absent."""
    if not helpers.CORPUS.is_dir():
        pytest.skip(f"no corpus at {helpers.CORPUS}: set SUBQUAD_DATA to the folder that holds corpus/")
    return helpers.CORPUS
