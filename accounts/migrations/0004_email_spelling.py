from __future__ import annotations

from django.db import migrations, models


class Migration(migrations.Migration):
    """Labels only: the database does not change."""

    dependencies = [("accounts", "0003_api_key_name")]

    operations = [
        migrations.AlterField(
            model_name="user",
            name="email",
            field=models.EmailField(max_length=254, unique=True, verbose_name="email address"),
        ),
        migrations.AlterField(
            model_name="user",
            name="notify_by_email",
            field=models.BooleanField(default=True, verbose_name="email when a job ends"),
        ),
    ]
