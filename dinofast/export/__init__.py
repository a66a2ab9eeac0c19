"""A trained backbone in the formats of other programs: one file a target.

Each has `SUFFIX` (of the file, or "" for a folder), `FILES` (what such a folder holds), `NEEDS`
(packages that write it), `check(source)` (raises `ValueError` for what the format cannot hold),
`is_kind(path)` (whether a file is one), `write(source, path)`, `load(path)` (features by the
program that it is for; raises `ImportError` where that is missing) and `usage(path)`.
"""

from .writing import TARGETS as TARGETS
from .writing import export as export
