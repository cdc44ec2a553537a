"""Text that every machine with Python has, in two domains: prose and code, as tokens."""

import ast
import contextlib
import importlib
import random
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from eplb_core._checks import require

_CHARACTERS = 800_000  # of each domain
_CHARACTERS_FOR_VOCABULARY = 100_000
_HELD_OUT = 0.4


class Domain(NamedTuple):
    """Tokens of one kind of text.

    train: `[tokens]` what a model may learn from.
    held_out: `[tokens]` other documents of the same kind.
    """

    train: Int[Tensor, " tokens"]
    held_out: Int[Tensor, " tokens"]


def read_domains(vocab_size: int, seed: int) -> dict[str, Domain]:
    """Read prose (documentation) and code (what is left of the modules) from the standard library.

    Byte-pair tokens are learned from both. The same Python version and seed give the same tokens.

    Args:
        vocab_size: tokens to learn, 256 bytes included.
        seed: order of the documents, and so what is held out.

    Returns:
        The domains `"prose"` and `"code"`.

    Raises:
        EplbError: if the standard library has no sources here.
    """
    texts = _read_texts(seed)
    tokenizer = _learn_tokens(texts, vocab_size)
    domains = {}
    for name, text in texts.items():
        tokens = torch.tensor(tokenizer.encode(text).ids)
        num_train = int(len(tokens) * (1 - _HELD_OUT))
        domains[name] = Domain(tokens[:num_train], tokens[num_train:])
    return domains


def _read_texts(seed: int) -> dict[str, str]:
    folder = Path(sysconfig.get_path("stdlib"))
    modules = sorted(folder.glob("*.py"))
    require(
        bool(modules),
        "`read_domains` reads the sources of the standard library",
        f"no *.py in {folder}",
        "Use a Python that comes with them, as those of python.org, conda and Linux distributions do.",
    )
    shuffle = random.Random(seed).shuffle
    shuffle(modules)
    documents: dict[str, list[str]] = {"prose": list(_reference_topics()), "code": []}
    for module in modules:
        if all(sum(map(len, found)) >= _CHARACTERS for found in documents.values()):
            break
        docstrings, code = _separate(module.read_text(encoding="utf-8", errors="replace"))
        documents["prose"] += docstrings
        documents["code"].append(code)
    for found in documents.values():
        shuffle(found)
    return {name: "\n\n".join(found)[:_CHARACTERS] for name, found in documents.items()}


def _reference_topics() -> Iterator[str]:
    """The language reference as `pydoc` shows it, where it is installed."""
    with contextlib.suppress(ImportError):
        yield from importlib.import_module("pydoc_data.topics").topics.values()


def _separate(source: str) -> tuple[list[str], str]:
    """Docstrings without examples, and the source without any docstring."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in old modules
        tree = ast.parse(source)
    docstrings, lines = [], source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        if ">>>" not in docstring:
            docstrings.append(docstring)
        statement = node.body[0]
        for number in range(statement.lineno - 1, statement.end_lineno or statement.lineno):
            lines[number] = ""
    return docstrings, "".join(lines)


def _learn_tokens(texts: Mapping[str, str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((text[:_CHARACTERS_FOR_VOCABULARY] for text in texts.values()), trainer)
    return tokenizer
