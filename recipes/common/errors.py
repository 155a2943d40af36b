"""How a run ends other than by finishing: the user's input is wrong, somebody stopped it, or it was only a dry run."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """The user's input is wrong. Says what, where and the nearest fix; ends the process with exit code 2 and no traceback.

    `problems` holds one text a problem, so that everything that is wrong is said at once.
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; a resumable checkpoint is on disk. Ends the process with exit code 130."""


class DryRunDone(Exception):
    """`--dry-run` has said all that it can say without training. Ends the process with exit code 0."""
