"""`manage.py create_tables`: makes the DynamoDB tables that are missing. Safe to repeat."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand

from jobs.store.tables import create_tables


class Command(BaseCommand):
    help = "Makes the DynamoDB tables that are missing."

    def handle(self, *args: Any, **options: Any) -> None:
        create_tables()
