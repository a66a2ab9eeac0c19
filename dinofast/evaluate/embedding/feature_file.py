"""Files of features: .npz, for which NumPy is enough, and .parquet. Both are written in pieces, so
that a million images take no more memory than a few thousand."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...checkpoint.storage import write

ENDINGS = (".npz", ".parquet")
ROWS = 2**12  # whose paths are written at a time; of a .parquet, a row group


@dataclass(frozen=True)
class FeatureTable:
    """n features of `width` numbers. path: the i-th image's. pieces: features (m, width) of `dtype`
    in order, which together are all. labels: (n,) int64, with the names of their classes, or
    neither. metadata: what is to be told of them, in plain values."""

    n: int
    width: int
    dtype: np.dtype
    path: Callable[[int], str]
    pieces: Callable[[], Iterator[np.ndarray]]
    labels: np.ndarray
    classes: tuple[str, ...]
    metadata: dict[str, Any]


def check_features_file(path: str) -> None:
    """Raise `ValueError` for a file of another kind than those of features, and for .parquet where
    pyarrow is missing."""
    ending = os.path.splitext(path)[1].lower()
    if ending not in ENDINGS:
        raise ValueError(f"`features` is '{path}': let its name end in {' or '.join(ENDINGS)}.")
    if ending == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"`features` is '{path}', for which pyarrow is needed ({error}): pip install "
                "pyarrow, or let the name end in .npz."
            ) from error


def write_features(path: Path, table: FeatureTable) -> None:
    """The file, atomically; the same table gives the same bytes. Its columns or arrays: path,
    feature, and label and class where there are classes.

    An .npz holds path (n,) text, feature (n, width), label (n,) int64, class (classes,) text, and
    metadata () JSON. A .parquet holds a row an image, its class by name, and the same JSON as
    `dinofast` in the metadata of its schema.
    """
    fill = _fill_parquet if path.suffix.lower() == ".parquet" else _fill_npz
    write(path, partial(fill, table), lambda written: None)


def _fill_npz(table: FeatureTable, file: IO[bytes]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        width = max(map(len, map(table.path, range(table.n))), default=1)
        names = (
            np.array(list(map(table.path, rows)), f"<U{width}") for rows in _ranges(table.n)
        )  # 4 bytes a character, three of them 0
        _add(archive, "path", np.dtype(f"<U{width}"), (table.n,), names, zipfile.ZIP_DEFLATED)
        shape = (table.n, table.width)
        _add(archive, "feature", table.dtype, shape, table.pieces())
        if table.classes:
            for name, array in (("label", table.labels), ("class", np.array(table.classes))):
                _add(archive, name, array.dtype, array.shape, [array])
        told = np.array(json.dumps(table.metadata))
        _add(archive, "metadata", told.dtype, (), [told])


def _add(
    archive: zipfile.ZipFile,
    name: str,
    dtype: np.dtype,
    shape: Sequence[int],
    pieces: Iterable[np.ndarray],
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """An array of an .npz, in pieces along its first axis."""
    member = zipfile.ZipInfo(f"{name}.npy")  # of 1980, or no two files would be the same
    member.compress_type = compression
    with archive.open(member, "w", force_zip64=True) as file:
        descr = np.lib.format.dtype_to_descr(dtype)
        head = {"descr": descr, "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(file, head)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).data.cast("B") if piece.size else b"")


def _fill_parquet(table: FeatureTable, file: IO[bytes]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    feature = pa.list_(pa.from_numpy_dtype(table.dtype), table.width)
    columns = [("path", pa.string()), ("feature", feature)]
    if table.classes:
        columns += [("label", pa.int64()), ("class", pa.string())]
    schema = pa.schema(columns, metadata={"dinofast": json.dumps(table.metadata)})
    plain = {"use_dictionary": ["class"], "write_statistics": ["path", "label", "class"]}
    start = 0
    with pq.ParquetWriter(file, schema, **plain) as writer:
        for piece in _regrouped(table.pieces()):
            rows = range(start, start + len(piece))
            flat = pa.array(np.ascontiguousarray(piece).reshape(-1))
            arrays = [
                pa.array([_utf8(table.path(i)) for i in rows], pa.string()),
                pa.FixedSizeListArray.from_arrays(flat, type=feature),
            ]
            if table.classes:
                labels = table.labels[start : rows.stop]
                names = [_utf8(table.classes[label]) for label in labels]
                arrays += [pa.array(labels, pa.int64()), pa.array(names, pa.string())]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            start = rows.stop


def _ranges(n: int) -> Iterator[range]:
    return (range(start, min(start + ROWS, n)) for start in range(0, n, ROWS))


def _regrouped(pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same rows, ROWS at a time, however they came."""
    held: list[np.ndarray] = []
    for piece in pieces:
        while len(piece):
            room = ROWS - sum(map(len, held))
            held.append(piece[:room])
            piece = piece[room:]
            if sum(map(len, held)) == ROWS:
                yield np.concatenate(held)
                held = []
    if held:
        yield np.concatenate(held)


def _utf8(path: str) -> str:
    """Parquet's text is UTF-8, a file's name need not be: its other bytes as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
