#!/usr/bin/env python
"""Django's command line."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "llmtuner.settings")
    # Only this account can read new files, except static files and source code, which others should be able to read.
    if sys.argv[1:2] not in (["collectstatic"], ["makemigrations"]):
        os.umask(0o077)
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)
