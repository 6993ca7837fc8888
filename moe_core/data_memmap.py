"""Token files that are mapped, not read: a folder to carry to another machine, with the same batches there.

`header.json` names vocab_size, boundary and, for each domain, its name, tokens file (raw little-endian uint16
or uint32), documents file (raw little-endian int64: where documents begin, then the number of positions) and,
if known, the digest of both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import DataConfig
from .data_packing import Domain
from .data_sources import Corpus, token_file

if TYPE_CHECKING:
    from .data import Data

_CHUNK = 1 << 22
HEADER = "header.json"
FORMAT = "twinmoe-tokens-1"
TRUSTED_SIZE = 1 << 28
"""Token files above this many bytes are not read through at start: their recorded digest is believed."""


def export(data: Data, directory: str | Path) -> Path:
    """Write the corpus of `data` (a Data) into a new folder that `data.source: memmap` reads; returns the header.

    With the rest of the configuration unchanged, batches and hash are the same. ValueError if the folder
    holds an export already.
    """
    folder = new_folder(directory)
    header = folder / HEADER
    corpus = data.corpus
    domains = []
    for number, domain in enumerate(corpus.domains):
        tokens, documents = token_file(number), f"documents_{number}.bin"
        dtype = "uint16" if corpus.vocab_size <= 1 << 16 else "uint32"
        if not _is_there(domain, folder / tokens, dtype):
            with (folder / tokens).open("wb") as file:
                for first in range(0, len(domain.tokens), _CHUNK):
                    part = domain.tokens[first : first + _CHUNK]
                    part.astype(np.dtype(dtype).newbyteorder("<"), copy=False).tofile(file)
        domain.starts.astype("<i8", copy=False).tofile(folder / documents)
        digest = corpus.digests[number] if corpus.digests else domain.digest()
        entry = {"name": domain.name, "tokens": tokens, "documents": documents, "dtype": dtype, "digest": digest}
        domains.append(entry)
    about = {"format": FORMAT, "vocab_size": corpus.vocab_size, "boundary": corpus.boundary, "domains": domains}
    header.write_text(json.dumps(about, indent=2) + "\n")
    return header


def new_folder(directory: str | Path) -> Path:
    """The folder, made if need be. ValueError if it holds an export already."""
    folder = Path(directory)
    if (folder / HEADER).exists():
        raise ValueError(f"{folder} holds an exported data set already; choose another folder or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _is_there(domain: Domain, file: Path, dtype: str) -> bool:
    """Whether the tokens were written to that very file when they were read."""
    tokens = domain.tokens
    mapped = isinstance(tokens, np.memmap) and tokens.filename is not None and Path(tokens.filename) == file.absolute()
    return mapped and isinstance(tokens, np.ndarray) and tokens.dtype == np.dtype(dtype).newbyteorder("<")


def read_memmap(config: DataConfig, trusted_size: int = TRUSTED_SIZE) -> Corpus:
    """Map the exported folder that `data.paths` names. ValueError when files are missing, cut short or changed."""
    if len(config.paths) != 1:
        raise ValueError("data.source=memmap needs data.paths with one exported folder; run: twinmoe data export")
    folder = Path(config.paths[0])
    header = folder / HEADER
    if not header.is_file():
        raise ValueError(f"data.paths: {folder} holds no header.json; make the folder with: twinmoe data export")
    try:
        about = json.loads(header.read_text())
        if about.get("format") != FORMAT:
            raise ValueError(f"{header} says format {about.get('format')!r}, not {FORMAT!r}; export the data again")
        domains = [_map_domain(folder, entry) for entry in about["domains"]]
        return Corpus(
            tuple(domains), int(about["boundary"]), int(about["vocab_size"]), _digests(about, domains, trusted_size)
        )
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{header} is not a complete header ({error!r}); export the data again") from error


def _map_domain(folder: Path, entry: dict[str, Any]) -> Domain:
    try:
        dtype = {"uint16": "<u2", "uint32": "<u4"}[entry["dtype"]]
        tokens = np.memmap(folder / entry["tokens"], dtype, mode="r")
        starts = np.fromfile(folder / entry["documents"], "<i8").astype(np.int64)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: the files of {entry['name']!r} cannot be mapped: {error}; export again") from error
    if len(starts) < 2 or starts[0] != 0 or (np.diff(starts) < 1).any() or starts[-1] + 1 != len(tokens):
        raise ValueError(f"{folder}: the document boundaries of {entry['name']!r} do not fit its tokens; export again")
    return Domain(entry["name"], tokens, starts)


def _digests(about: dict[str, Any], domains: list[Domain], trusted_size: int) -> tuple[str, ...]:
    digests = []
    for entry, domain in zip(about["domains"], domains, strict=True):
        said = entry.get("digest")
        if said is None or domain.tokens.nbytes <= trusted_size:
            found = domain.digest()
            if said not in (None, found):
                raise ValueError(f"the tokens of {domain.name!r} changed since they were exported; export them again")
            digests.append(found)
        else:
            digests.append(said)
    return tuple(digests)
