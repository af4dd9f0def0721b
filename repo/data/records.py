"""Records: the rows of JSON lines, JSON, csv and parquet files, folders and Hugging Face datasets."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.hub import require_data_set

HUB_NAME = re.compile(r"[\w-]+/[\w-]+(\.\d[\w-]*)*")  # a dot before a letter means a file name
TABLES = {".csv": ",", ".tsv": "\t"}
JSON = (".jsonl", ".json")
COMPRESSED: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
"""Suffix of compressed JSON lines -> what opens them."""
FORMATS = "a data file is JSON lines, JSON (a list of objects), csv, tsv or parquet"

Records = Iterator[tuple[str, Any]]
"""(file and line, or source and row; record) for every record."""


def read_records(source: str, split: str) -> Records:
    """Read the records of a source, as load_prompts takes it. split: read if the source names none.

    Raises UserError if there is no such source, or for a line or row that cannot be read.
    """
    name, _, part = source.rpartition("#") if "#" in source and not Path(source).exists() else (source, "", "")
    path = Path(name)
    if not path.exists() and not HUB_NAME.fullmatch(name):
        raise UserError(f"prompt file not found: {name}")
    if path.is_file() and part:
        raise UserError(f"{source}: a file has no splits; leave out #{part}")
    if path.is_file() and path.suffix != ".parquet":
        return _file(path)
    table = _table(source, name, part, split)
    if isinstance(table, list):
        return (found for file in table for found in _file(file))
    plain = [
        c for c, feature in table.features.items() if not hasattr(feature, "decode_example")
    ]  # no images, no sound
    return ((f"{source} row {n}", row) for n, row in enumerate(table.select_columns(plain), 1))


def _file(path: Path) -> Records:
    """Read a file by its suffix. Raises UserError for a line that does not fit the format."""
    return _csv_rows(path, TABLES[path.suffix]) if path.suffix in TABLES else _json_lines(path)


def _json_lines(path: Path) -> Records:
    """Yield ("path:line", record) for every line that is not blank, or for every item of a list that fills the file."""
    content = _content(path).removeprefix(b"\xef\xbb\xbf")
    if path.suffix == ".json" and content.lstrip()[:1] == b"[":
        yield from ((f"{path} item {n}", r) for n, r in enumerate(_parsed(content, str(path)), 1))
        return
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, f"{path}:{number}")


def _content(path: Path) -> bytes:
    """Read a file, decompressed if its suffix says so. Raises UserError if what it holds is not so compressed."""
    if path.suffix not in COMPRESSED:
        return path.read_bytes()
    try:
        with COMPRESSED[path.suffix](path, "rb") as file:
            return file.read()
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path}: not a {path.suffix} file: {error}") from None


def _parsed(content: bytes, where: str) -> Any:
    """Parse JSON. Raises UserError that begins with `where`."""
    try:
        value = json.loads(content)
        json.dumps(value, ensure_ascii=False).encode()  # refuses half of a surrogate pair, which is not text
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise UserError(f"{where}: not JSON: {error}; {FORMATS}") from None
    return value


def _csv_rows(path: Path, delimiter: str) -> Records:
    """Yield ("path:line", record) for every row below the header; an empty cell is None."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            header = list(reader.fieldnames or ())
            if twice := [name for name in header if header.count(name) > 1]:
                raise UserError(f"{path}: the header names the column {twice[0]!r} twice")
            for row in reader:
                if None in row or None in row.values():
                    names = ", ".join(header)
                    raise UserError(f"{path}:{reader.line_num}: a row must have one cell for each of {names}")
                yield f"{path}:{reader.line_num}", {name: cell or None for name, cell in row.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not csv in UTF-8: {error}; {FORMATS}") from None


def _table(source: str, name: str, part: str, split: str) -> Any:
    """Load the datasets.Dataset of a parquet file, folder or hub name; a list of Paths for a folder of our own formats.

    source: for messages, as the user wrote it. name: source without `#part`. part: split or config/split, "" if none is
    named. split: read if part names none.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source} needs the package datasets: pip install datasets") from None
    if not Path(name).exists():
        require_data_set(name)
    path = Path(name).resolve()  # absolute, because load_dataset reads a bare "json" or "csv" as a format
    config, _, chosen = part.rpartition("/")
    try:
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = _own_files(datasets, path, config) if path.is_dir() else None
            loaded = loaded or datasets.load_dataset(str(path) if path.is_dir() else name, config or None)
    except Exception as error:  # formats raise many types; the cause of a DatasetGenerationError is the real reason
        reason = " ".join(f"{type(error).__name__}: {error} {error.__cause__ or ''}".split())
        raise UserError(f"cannot read {source} as name, name#split or name#config/split: {reason:.300}") from error
    splits = loaded if isinstance(loaded, dict) else {} if part else {split: loaded}
    if (chosen or split) not in splits:
        raise UserError(f"{source} has no split {chosen or split!r}; there are: {', '.join(splits) or 'none'}")
    return splits[chosen or split]


def _own_files(datasets: Any, folder: Path, config: str) -> dict[str, list[Path]]:
    """Return split -> files as datasets finds them, if all are in formats of ours; else {}.

    A file in a folder is then read as it is alone: datasets would guess one type for a column, turn texts into dates,
    and fail where a column is null in a whole block.
    """
    files = datasets.load_dataset_builder(str(folder), config or None).config.data_files or {}
    splits = {str(split): [Path(str(file)) for file in found] for split, found in files.items()}
    ours = all(path.suffix in (*JSON, *TABLES) and path.is_file() for found in splits.values() for path in found)
    return splits if ours else {}


def require_column(column: str, default: str, records: Iterable[Any], source: str) -> None:
    """Raise UserError, which lists the columns present, unless a record has the column.

    default: the column whose absence is no fault as long as the records have `messages`.
    """
    names = list(dict.fromkeys(name for record in records if isinstance(record, dict) for name in record))
    if (names and not {column, "messages"} & {*names}) or (column != default and column not in names):
        wanted = f"`{column}` or `messages`" if column == default else f"`{column}`"
        raise UserError(f"{source} has no column {wanted}; it has: {', '.join(names) or 'none'}")
