"""The product's settings with the folder and ports of this test run. The environment is set before the settings are
imported, so that every process a test starts inherits it."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

from tests import services

# Each parallel pytest process has its own folder and stores. Processes that a test starts use those of the test.
worker = os.environ.get("PYTEST_XDIST_WORKER", "")
if os.environ.get("LLMTUNER_TEST_DIR_OF") != worker:
    os.environ["LLMTUNER_TEST_DIR_OF"] = worker
    folder = tempfile.mkdtemp(prefix="llmtuner-tests-")
    os.environ["LLMTUNER_TEST_DIR"] = folder
    os.environ["DYNAMODB_PORT"] = str(services.free_port())
    os.environ["REDIS_PORT"] = str(services.free_port())
    os.environ["WEB_PORT"] = str(services.free_port())
    os.environ.update(
        VAR_DIR=folder,
        DATABASE_URL=f"sqlite:///{folder}/db.sqlite3",
        DYNAMODB_ENDPOINT=f"http://127.0.0.1:{os.environ['DYNAMODB_PORT']}",
        DYNAMODB_SECRET=services.DYNAMODB_SECRET,
        REDIS_URL=f"redis://:{services.REDIS_PASSWORD}@127.0.0.1:{os.environ['REDIS_PORT']}/0",
        PUBLIC_URL=f"http://localhost:{os.environ['WEB_PORT']}",
        # Pages are served over plain HTTP, and email stays in memory.
        DEBUG="0",
        LLMTUNER_ENV="test",
        HF_HUB_OFFLINE="1",
        BASE_MODEL_ALIASES="gpt-4o-mini-2024-07-18=starter",  # the model that scripts written for OpenAI use
        OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
    )
    for name in ("AWS_STORAGE_BUCKET_NAME", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOOGLE_CLIENT_ID"):
        os.environ.pop(name, None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

from llmtuner.settings import *  # noqa: E402, F403  the environment above must be set first

# A file, so that web and workers started by a test see the rows that the test has written.
DATABASES["default"]["TEST"] = {"NAME": os.environ["LLMTUNER_TEST_DIR"] + "/db.sqlite3"}  # noqa: F405
