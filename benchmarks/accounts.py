"""Whether the time of an answer tells who has an account: `bin/bench accounts`.

Signing in, resetting a password and signing up, without and with a mail server, for addresses that have an account and
for others, in turns. Printed is the median difference in milliseconds against the 10 that are promised.
`tests/accounts/test_equal_work.py` compares the work instead, which no other load changes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import Scores

MOST_MS = 10.0
PASSWORD = "correct-horse-battery-9"  # noqa: S105  of accounts that live as long as this
WRONG = "wrong-horse-battery"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench accounts", description=__doc__)
    parser.add_argument(
        "--pairs", type=int, default=25, help="of addresses, each with and without an account"
    )
    options = parser.parse_args()

    from tests.faults import environment as env

    env.prepare_environment()
    from tests import services

    redis = services.redis(Path(os.environ["LLMTUNER_TEST_DIR"]), int(os.environ["REDIS_PORT"])).start()
    try:
        return measure(Scores(), options.pairs)
    finally:
        redis.kill()


def measure(scores: Scores, pairs: int) -> int:
    import django
    from django.core.management import call_command
    from django.test.utils import override_settings, setup_test_environment

    django.setup()
    setup_test_environment()  # mails stay in memory
    call_command("migrate", verbosity=0)
    from allauth.account.models import EmailAddress

    from accounts.models import User

    known = [f"known-{i}@example.com" for i in range(pairs)]
    for email in known:
        user = User.objects.create_user(email, PASSWORD)
        EmailAddress.objects.create(user=user, email=email, verified=True, primary=True)

    def add(name: str, path: str, **body: str) -> None:
        difference = compare(
            lambda email: post(path, {"email": email, **body}), known, name.replace(" ", "-")
        )
        scores.add(f"{name}, difference ms", max(difference, 0.01), MOST_MS, 1.0, less_is_better=True)

    add("sign in", "auth/login", password=WRONG)
    add("reset the password", "auth/password/request")
    add("sign up without mail", "auth/signup", password=PASSWORD)
    with override_settings(
        EMAIL_URL="smtp://mail.example.com",
        ACCOUNT_EMAIL_VERIFICATION="mandatory",
        ACCOUNT_EMAIL_VERIFICATION_BY_CODE_ENABLED=True,
    ):
        add("sign up with mail", "auth/signup", password=PASSWORD)
    return scores.end()


def post(path: str, body: dict[str, Any]) -> None:
    from django.test import Client

    Client().post(f"/_allauth/app/v1/{path}", body, content_type="application/json")


def compare(ask: Callable[[str], None], known: list[str], others: str) -> float:
    """The median difference of pairs asked in turns, in milliseconds."""
    ask(known[0])
    ask(f"{others}-first@example.com")
    differences = []
    for i, email in enumerate(known):
        other = f"{others}-{i}@example.com"
        if i % 2:  # who comes first may be slower
            theirs, ours = milliseconds(ask, other), milliseconds(ask, email)
        else:
            ours, theirs = milliseconds(ask, email), milliseconds(ask, other)
        differences.append(ours - theirs)
    return abs(statistics.median(differences))


def milliseconds(ask: Callable[[str], None], email: str) -> float:
    """Of the processor, which other programs disturb less than the clock."""
    from django.core.cache import cache

    cache.clear()  # so that no limit answers instead
    began = time.process_time()
    ask(email)
    return (time.process_time() - began) * 1000


if __name__ == "__main__":
    sys.exit(main())
