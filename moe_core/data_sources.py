"""Where documents come from: the standard library, text files, Hugging Face data sets; and the tokenizer."""

from __future__ import annotations

import glob
import importlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .config import DataConfig
from .data_packing import Domain

END_OF_TEXT = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
BATCH_BYTES = 1 << 22
"""Text that is tokenized at a time."""

_NOT_LIBRARY = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}


@dataclass(frozen=True)
class Tokenizer:
    """encode: documents (bytes) -> integer arrays. boundary: the token between documents, below vocab_size."""

    encode: Callable[[list[bytes]], list[np.ndarray]]
    boundary: int
    vocab_size: int


@dataclass(frozen=True)
class Corpus:
    """All documents of an experiment. digests: content hash of each domain where it is known already."""

    domains: tuple[Domain, ...]
    boundary: int
    vocab_size: int
    digests: tuple[str, ...] = ()


def open_tokenizer(name: str) -> Tokenizer:
    """`bytes` (256 values, 256 is the boundary), or the path of a `tokenizers` JSON file.

    A file's own end-of-text token is the boundary; without one, a token is added behind its vocabulary.
    """
    if name == "bytes":
        return Tokenizer(lambda documents: [np.frombuffer(d, np.uint8) for d in documents], 256, 257)
    if not os.path.isfile(name):
        raise ValueError(f"data.tokenizer={name!r} is not a file; give 'bytes' or the path of a tokenizer.json")
    library = _extra("tokenizers", "data.tokenizer")
    model = library.Tokenizer.from_file(name)
    size = model.get_vocab_size()
    ids = [i for i in map(model.token_to_id, END_OF_TEXT) if i is not None]

    def encode(documents: list[bytes]) -> list[np.ndarray]:
        texts = [d.decode("utf-8", errors="replace") for d in documents]
        return [np.array(e.ids, np.int64) for e in model.encode_batch(texts, add_special_tokens=False)]

    return Tokenizer(encode, ids[0] if ids else size, size if ids else size + 1)


def read_corpus(config: DataConfig, spool: Path | None = None) -> Corpus:
    """Read and tokenize what `data.source` names (all but `memmap` and `megatron`), some documents at a time.

    spool: folder for the tokens, which are mapped then; without it they are held in memory. ValueError says what to
    change.
    """
    tokenizer = open_tokenizer(config.tokenizer)
    readers = {"stdlib": _stdlib, "text": _text, "hf": _hf}
    domains = []
    for number, (name, documents) in enumerate(readers[config.source](config)):
        batches = (tokenizer.encode(batch) for batch in _in_batches(documents))
        file = None if spool is None else spool / token_file(number)
        domains.append(Domain.from_batches(name, batches, tokenizer.boundary, file))
    return Corpus(tuple(domains), tokenizer.boundary, tokenizer.vocab_size)


def token_file(number: int) -> str:
    """Name of a domain's token file."""
    return f"tokens_{number}.bin"


def _in_batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Documents in lists of about BATCH_BYTES."""
    batch: list[bytes] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch


def _stdlib(config: DataConfig) -> Iterable[tuple[str, Iterable[bytes]]]:
    """Sources that do not depend on the machine (no build settings), by path; then the help topics by name."""
    if config.paths:
        raise ValueError("data.paths is not used by data.source=stdlib; set data.source=text to train on your files")
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [i for i in inner if i not in _NOT_LIBRARY and not i.startswith("config-")]
        files += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    files.sort(key=lambda f: f.relative_to(root).as_posix())
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        topics = {}
    if not files or not topics:
        raise ValueError("this Python has no library sources or help topics; set data.source=text and data.paths")
    yield "sources", (f.read_bytes() for f in files)
    yield "topics", (topics[t].encode() for t in sorted(topics))


def _text(config: DataConfig) -> Iterable[tuple[str, Iterable[bytes]]]:
    """Each path or pattern is a domain, each file a document, in the order of their names."""
    if not config.paths:
        raise ValueError("data.source=text needs data.paths: one or more files or patterns such as 'books/*.txt'")
    for path in config.paths:
        yield path, (_read(f) for f in matching_files(path))


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"data.paths: cannot read {file!r} ({error.strerror}); check its permissions") from error


def matching_files(path: str) -> list[str]:
    """Files that a path or pattern names, sorted. ValueError if there are none."""
    files = [path] if os.path.isfile(path) else [f for f in glob.glob(path, recursive=True) if os.path.isfile(f)]
    if not files:
        hint = f"; to take a folder's files write '{path.rstrip('/')}/*'" if os.path.isdir(path) else ""
        raise ValueError(f"data.paths: no file matches {path!r}{hint or '; check the path'}")
    return sorted(files)


def _hf(config: DataConfig) -> Iterable[tuple[str, Iterable[bytes]]]:
    """Rows of a data set, each a document: a saved folder, files (each path a domain) or a name on the hub.

    Files are streamed: neither all of their text nor a copy in a cache is kept.
    """
    try:
        sets = _load_sets(config)
    except (OSError, RuntimeError) as error:
        wanted = config.dataset or ", ".join(config.paths)
        raise ValueError(
            f"data.source=hf cannot load {wanted!r}: {error}; check the name, the split and the network"
        ) from error
    for name, rows in sets.items():
        columns = rows.column_names or list(next(iter(rows), {}))
        if config.text_field not in columns:
            raise ValueError(
                f"data.text_field={config.text_field!r} is not a column of {name!r}; choose one of {columns}"
            )
        texts = rows.select_columns([config.text_field])
        yield name, ((row[config.text_field] or "").encode() for row in texts)


def _load_sets(config: DataConfig) -> dict[str, Any]:
    library = _extra("datasets", "data.source=hf")
    if config.dataset and os.path.isdir(config.dataset) and os.path.isfile(f"{config.dataset}/dataset_info.json"):
        return {config.dataset: library.load_from_disk(config.dataset)}
    if config.paths:
        return {path: _load_files(library, path) for path in config.paths}
    if config.dataset:
        return {config.dataset: library.load_dataset(config.dataset, split=config.dataset_split)}
    raise ValueError("data.source=hf needs data.dataset (a name or a saved folder) or data.paths (local files)")


def _load_files(library: Any, path: str) -> Any:
    files = matching_files(path)
    kind = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}.get(
        Path(files[0]).suffix
    )
    if kind is None:
        raise ValueError(f"data.paths: {files[0]!r} is no json, jsonl, csv, parquet or txt file; convert it first")
    return library.load_dataset(kind, data_files=files, split="train", streaming=True)


def _extra(name: str, wanted_by: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{wanted_by} needs the package {name}; install it with: pip install 'twinmoe[hf]'") from error
