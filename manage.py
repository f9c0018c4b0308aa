#!/usr/bin/env python
"""Django's command line."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "llmtuner.settings")
    # For our own account only, except what others should read: static files and source code.
    if sys.argv[1:2] not in (["collectstatic"], ["makemigrations"]):
        os.umask(0o077)
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)
