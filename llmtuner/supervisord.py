"""supervisord as bin/up runs it: it goes on when its logs can't be written.

As it comes, supervisord reports such a line on standard error, and where that can't be written either (`bin/up >log 2>&1`
on a full disk, a terminal that was closed) the exception ends it, and the studio with it. Rotating a log fails the same
way. Here the line is lost, and the log goes on when there is space again.
"""

from __future__ import annotations

import contextlib
from typing import Any

from supervisor import loggers, supervisord


class Log(loggers.RotatingFileHandler):
    stream: Any

    def handleError(self) -> None:
        pass

    def emit(self, record: Any) -> None:
        # ValueError: a rotation before this one had closed the file and could not go on.
        with contextlib.suppress(OSError, ValueError):
            super().emit(record)
        if self.stream.closed:
            with contextlib.suppress(OSError):
                self.stream = open(self.baseFilename, "ab")  # noqa: SIM115  kept open: it is the log

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


loggers.RotatingFileHandler = Log

if __name__ == "__main__":
    supervisord.main()
