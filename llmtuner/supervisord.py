"""A supervisord for bin/up that keeps running when it cannot write its logs.

Normally, supervisord reports such a failure on standard error. If it cannot write there either (`bin/up >log 2>&1` on a full
disk, or a closed terminal), the exception ends supervisord and all of its processes. The same happens if rotating a log
fails. With this version, the line is lost and logging continues once there is space again.
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
        # ValueError: an earlier rotation closed the file and then failed.
        with contextlib.suppress(OSError, ValueError):
            super().emit(record)
        if self.stream.closed:
            with contextlib.suppress(OSError):
                self.stream = open(self.baseFilename, "ab")  # noqa: SIM115  not closed, because this is the log

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


loggers.RotatingFileHandler = Log

if __name__ == "__main__":
    supervisord.main()
