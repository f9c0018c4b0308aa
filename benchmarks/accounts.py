"""Whether response times reveal who has an account: `bin/bench accounts`.

Signing in, resetting a password and signing up, with and without a mail server, alternating between addresses with an
account and addresses without one. Prints the median difference in milliseconds beside the target of 10.
`tests/accounts/test_equal_work.py` compares the work done instead, which does not depend on other load.
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
PASSWORD = "correct-horse-battery-9"  # noqa: S105  of accounts that exist only during this benchmark
WRONG = "wrong-horse-battery"


def main() -> int:
    parser = argparse.ArgumentParser(prog="bin/bench accounts", description=__doc__)
    parser.add_argument(
        "--pairs", type=int, default=25, help="pairs of addresses, one with and one without an account"
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
    setup_test_environment()  # keeps emails in memory
    call_command("migrate", verbosity=0)
    from allauth.account.models import EmailAddress

    from accounts.models import User

    registered = [f"registered-{i}@example.com" for i in range(pairs)]
    for email in registered:
        user = User.objects.create_user(email, PASSWORD)
        EmailAddress.objects.create(user=user, email=email, verified=True, primary=True)

    def add(name: str, path: str, **body: str) -> None:
        difference = compare(
            lambda email: post(path, {"email": email, **body}), registered, name.replace(" ", "-")
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


def compare(send_request: Callable[[str], None], registered: list[str], prefix: str) -> float:
    """The median difference of the pairs in milliseconds. The two of a pair take turns at being first."""
    send_request(registered[0])
    send_request(f"{prefix}-first@example.com")
    differences = []
    for i, email in enumerate(registered):
        other = f"{prefix}-{i}@example.com"
        if i % 2:  # the first one may be slower
            theirs, ours = milliseconds(send_request, other), milliseconds(send_request, email)
        else:
            ours, theirs = milliseconds(send_request, email), milliseconds(send_request, other)
        differences.append(ours - theirs)
    return abs(statistics.median(differences))


def milliseconds(send_request: Callable[[str], None], email: str) -> float:
    """Of CPU time, which other programs disturb less than wall-clock time."""
    from django.core.cache import cache

    cache.clear()  # or the rate limit would respond
    started = time.process_time()
    send_request(email)
    return (time.process_time() - started) * 1000


if __name__ == "__main__":
    sys.exit(main())
