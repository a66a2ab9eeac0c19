"""The bad images that a process meets in a run: counted, listed, and too many of them told."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dinofast.data import dataset
from dinofast.data.bad_files import BadFileList, in_a_line
from dinofast.data.decode import BadFiles
from dinofast.data.reader import UNREAD_S, Met
from dinofast.runtime.words import counted

ENOUGH_DRAWN = 100  # images, before the share of bad ones can end a run
# standard deviations above the allowed share that are put down to which images happened to be drawn
CHANCE = 3.0


class BadImages:
    """found: bad files known from listing the source, of which there are n_images beside them.
    most: the share at which a run ends. source, whose: how messages name the source and the
    process. n_unread, unread_reason: images replaced because they could not be read at their turn,
    and why the last.

    Raises `ValueError` if listing has found too many.
    """

    def __init__(
        self, found: BadFiles, n_images: int, most: float, path: str, source: str, whose: str
    ) -> None:
        self._files, self._known = list(found), {path for path, _ in found}
        self._most, self._source, self._whose = most, source, whose
        self.n_images, self.n_drawn, self.n_replaced = n_images, 0, 0
        self.n_own = n_images  # that this process draws in an epoch
        self.n_unread, self.unread_reason = 0, ""
        self._list = BadFileList(path)
        self._listed_before: frozenset[str] | None = None
        if len(found) > most * (n_images + len(found)):  # shards, and folders
            raise ValueError(self._too_many(len(found), n_images + len(found)))

    def begin_run(self) -> None:
        """Of a new run: without the list of an earlier one."""
        self._list.clear()
        self._listed_before = None

    def begin(self, is_first: bool) -> None:
        """Before the first batch. is_first: of the processes, the one that lists what is known."""
        self._known_before()
        if is_first:
            self._list.append(self._files)

    @property
    def new(self) -> BadFiles:
        """Those that a run before this one has not listed."""
        known = self._known_before()
        return [bad for bad in self._files if in_a_line(bad[0]) not in known]

    def _known_before(self) -> frozenset[str]:
        """What the list names before this run adds to it."""
        if self._listed_before is None:
            self._listed_before = self._list.known()
        return self._listed_before

    def drawn(self, n: int, n_replaced: int, met: Sequence[Met]) -> None:
        """A batch of n images, of which so many were replaced. Raises `OSError` if too many are
        bad."""
        self.n_drawn += n
        self.n_replaced += n_replaced - self.record(met)
        self.check_share()

    def record(self, met: Sequence[Met]) -> int:
        """Count and list what was met; how many images were replaced for this time only."""
        # each worker meets it
        new = {
            path: reason for path, reason, kind in met if kind == "bad" and path not in self._known
        }
        self._known |= new.keys()
        self._files += new.items()
        self._list.append(list(new.items()))
        unread = [reason for _, reason, kind in met if kind == "unread"]
        self.n_unread = self.n_unread + len(unread)
        self.unread_reason = unread[-1] if unread else self.unread_reason
        return len(unread)

    def check_share(self) -> None:
        """Raise `OSError` if more of the images drawn are bad than the allowed share and chance
        explain."""
        n_own = self.n_own
        if self.n_drawn < min(ENOUGH_DRAWN, n_own):
            return
        epochs, rest = divmod(self.n_drawn, n_own)  # each epoch draws without putting back
        spread = epochs * n_own * (1 - n_own / self.n_images) + rest * (1 - rest / self.n_images)
        allowed = self._most * self.n_drawn + CHANCE * math.sqrt(
            spread * self._most * (1 - self._most)
        )
        if self.n_replaced > allowed:
            raise OSError(self._too_many(self.n_replaced, self.n_drawn, self._whose))

    def _too_many(self, n_bad: int, n: int, whose: str = "") -> str:
        return (
            f"{n_bad:,} of {counted(n, 'image')}{whose} {'is' if n_bad == 1 else 'are'} bad "
            f"and `max_bad_files` is {self._most:g}: {dataset.examples(self._files)}. "
            "Mend or remove these files; `dinofast check-data` finds them all."
        )

    def nothing(self, met: Sequence[Met]) -> Exception:
        """Why there is no batch."""
        self.record(met)
        if lost := [(path, reason) for path, reason, kind in met if kind == "lost"]:
            return OSError(
                f"the storage of {self._source} fails, no file could be read for up to "
                f"{UNREAD_S:g} s: {dataset.examples(lost[-1:])}."
            )
        n, kind = len(self._files), OSError if self.n_drawn else ValueError
        what = f"none of the first {n:,} images tried decodes" if n > 1 else "no image decodes"
        if self.n_drawn:
            what = "no image decodes any more"
        return kind(
            f"{what}: {dataset.examples(self._files[-3:])}. `dinofast check-data` tries every file."
        )
