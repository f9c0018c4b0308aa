"""A separate environment for fault injection: stores on disk, workers, a tiny base model and a small dataset.

Call `prepare_environment` before Django's settings are read: it points them at a fresh folder and free ports
(tests.settings).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import services
from tests.faults.proxy import Chaos

ROOT = services.ROOT
OWNER = "user-faults"
REVISION = "0" * 40
BUCKET, S3_KEY, S3_SECRET = "bucket", "faults-key", "faults-secret"
TINY = "tests/tiny"  # the tiny base model, like a model of the Hub that was downloaded before
SETTINGS: dict[str, Any] = {  # 200 steps take a few seconds
    "max_steps": 200,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "sequence_length": 64,
    "dropout": 0.1,
    "validation_fraction": 0.0,
    "checkpoint_every_steps": 20,
    "checkpoint_every_s": 0,
    "keep_best": False,
    "seed": 7,
}


def hub_folder() -> Path:
    return Path(os.environ["HF_HOME"]) / "hub" / ("models--" + TINY.replace("/", "--"))


def prepare_environment(*, objects_in_s3: bool = False) -> None:
    """Sets the environment variables. Call it before Django's settings are read; every process inherits them."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"
    import tests.settings  # noqa: F401  creates the folder and chooses the ports

    os.environ.setdefault("HF_HOME", os.environ["LLMTUNER_TEST_DIR"] + "/hf")
    if objects_in_s3:
        os.environ.update(
            AWS_STORAGE_BUCKET_NAME=BUCKET,
            AWS_S3_ENDPOINT_URL=f"http://127.0.0.1:{services.free_port()}",
            AWS_ACCESS_KEY_ID=S3_KEY,
            AWS_SECRET_ACCESS_KEY=S3_SECRET,
        )
        for module in ("tests.settings", "llmtuner.settings"):
            del sys.modules[module]  # they are imported again with these variables


def web_port() -> int:
    return int(os.environ["WEB_PORT"])


def objects() -> Path:
    """The folder of the stored objects on this disk, whether S3 or local storage serves them."""
    folder = Path(os.environ["LLMTUNER_TEST_DIR"])
    return folder / "s3" / BUCKET if os.environ.get("AWS_STORAGE_BUCKET_NAME") else folder / "objects"


MAKE_TINY = """
import sys, torch
from training.models.architecture import gpt2_config
from training.models.transformer import Transformer
from training.text.tokenizer import Tokenizer
torch.manual_seed(0)
tokens = max(Tokenizer.load(sys.argv[1]).backend.get_vocab(with_added_tokens=True).values()) + 1
Transformer.new(gpt2_config(vocab_size=tokens, n_positions=128, n_embd=32, n_layer=2, n_head=2), seed=1).save(sys.argv[2])
"""


def make_tiny_base() -> None:
    """2 layers with width 32, in the cache of the Hub's client."""
    from training.plan import catalog

    home = hub_folder()
    snapshot = home / "snapshots" / REVISION
    if (snapshot / "config.json").exists():
        return
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(REVISION)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (snapshot / name).write_bytes((catalog.STARTER_FOLDER / name).read_bytes())
    arguments = [sys.executable, "-c", MAKE_TINY, str(catalog.STARTER_FOLDER), str(snapshot)]
    subprocess.run(arguments, check=True, cwd=ROOT)


def dataset_text(rows: int = 120) -> bytes:
    rng = random.Random(1)
    lines = []
    for _ in range(rows):
        a, b = rng.randrange(50), rng.randrange(50)
        lines.append(json.dumps({"prompt": f"{a} plus {b} is", "completion": f" {a + b}"}))
    return "\n".join(lines).encode()


def ready_dataset(owner: str = OWNER) -> str:
    """A dataset with status ready, created without a checks worker."""
    from jobs.datasets import datasets

    dataset = datasets.receive(owner, "sums.jsonl", iter([dataset_text()]))
    datasets.finish_check(owner, dataset.dataset_id, "ready", summary={"examples": 120})
    return str(dataset.dataset_id)


@dataclass(frozen=True)
class Person:
    """A user with a session cookie and an API key."""

    session: str
    key: str


@dataclass
class Environment:
    """Processes by name. Stores keep their port and data when they are killed and restarted."""

    folder: Path
    dynamodb: services.Service
    redis: services.Service
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)  # for workers started from now on
    s3: services.Service | None = None
    s3_proxy: Chaos | None = None  # between the workers and S3

    def start_worker(
        self, name: str, queue: str = "training", *, shift_s: int = 0, variables: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """`shift_s`: offset of its wall clock."""
        shifted = ["tests.faults.shifted", str(shift_s)] if shift_s else []
        return self._start(name, [*shifted, "llmtuner", "worker", queue], variables or {})

    def start_web(self) -> None:
        """Returns once it responds."""
        process = self._start("web", ["llmtuner", "web"], {})
        while not services._responds_to_http(web_port()):
            assert process.poll() is None, self.log("web").read_text()[-3000:]
            time.sleep(0.05)

    def person(self, owner: str = OWNER) -> Person:
        """Creates a user with this owner id."""
        from django.core.management import call_command
        from django.test import Client

        from accounts import api_keys
        from accounts.models import User

        call_command("migrate", verbosity=0)
        user = User.objects.filter(owner_id=owner).first() or User.objects.create_user(
            email=f"{owner}@example.com", owner_id=owner
        )
        client = Client()
        client.force_login(user, backend="allauth.account.auth_backends.AuthenticationBackend")
        _, key = api_keys.create(user, "faults", ["read", "write", "inference"])
        return Person(client.cookies["session"].value, key)

    def _start(self, name: str, argv: list[str], variables: dict[str, str]) -> subprocess.Popen[bytes]:
        with self.log(name).open("ab") as log:
            self.workers[name] = subprocess.Popen(
                [sys.executable, "-m", *argv],
                cwd=ROOT,
                env={**os.environ, **self.variables, **variables},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                preexec_fn=services._die_with_parent,
            )
        return self.workers[name]

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def kill(self, name: str, sig: int = signal.SIGKILL) -> None:
        process = self.workers.pop(name)
        process.send_signal(signal.SIGCONT)
        process.send_signal(sig)
        process.wait(45)

    def stop(self) -> None:
        for process in self.workers.values():
            process.kill()
        for process in self.workers.values():
            process.wait()
        self.workers.clear()
        self.redis.kill()
        self.dynamodb.kill()
        if self.s3 and self.s3_proxy:
            self.s3_proxy.stop()
            self.s3.kill()


def start_environment() -> Environment:
    """Starts the stores and creates the tables and the tiny base model; no worker runs yet."""
    import django

    django.setup()
    folder = Path(os.environ["LLMTUNER_TEST_DIR"])
    dynamodb = services.dynamodb(folder, int(os.environ["DYNAMODB_PORT"]), on_disk=True).start()
    redis = services.redis(folder, int(os.environ["REDIS_PORT"])).start()
    from jobs.store.tables import create_tables

    create_tables()
    make_tiny_base()
    environment = Environment(folder, dynamodb, redis)
    if os.environ.get("AWS_STORAGE_BUCKET_NAME"):
        (folder / "s3" / BUCKET).mkdir(parents=True)
        port = int(os.environ["AWS_S3_ENDPOINT_URL"].rpartition(":")[2])
        environment.s3 = services.s3(folder, S3_KEY, S3_SECRET, port).start()
        environment.s3_proxy = Chaos(port)
        environment.variables["AWS_S3_ENDPOINT_URL"] = f"http://127.0.0.1:{environment.s3_proxy.port}"
    return environment


# ---- observing ---------------------------------------------------------------------------------------------------------


def submit(dataset_id: str, owner: str = OWNER, **settings: Any) -> str:
    from jobs.lifecycle import transitions
    from jobs.registry import base_models
    from jobs.store.tables import DatasetReport, HubModel
    from training.plan import catalog

    tiny = catalog.describe(hub_folder() / "snapshots" / REVISION, id=TINY)
    snapshot = tiny.as_dict() | {"revision": REVISION}
    # as if the model had been checked, and the dataset with its tokenizer
    HubModel(owner, TINY, snapshot=snapshot).save()
    DatasetReport(
        dataset_id,
        base_models.tokenizer_family(snapshot),
        owner=owner,
        base_snapshot=snapshot,
        status="ready",
    ).save()
    request = transitions.JobRequest(base=TINY, dataset_id=dataset_id, settings=SETTINGS | settings)
    return str(transitions.submit(owner, request).job_id)


def job_of(job_id: str, owner: str = OWNER) -> Any:
    """The current row. Retries while the store is down."""
    from jobs.store import access

    while True:
        try:
            return access.get_job_for(owner, job_id)
        except access.NotFound:
            raise
        except Exception:
            time.sleep(0.2)


def wait_until(job_id: str, condition: Any, seconds: float = 300, owner: str = OWNER) -> Any:
    until = time.monotonic() + seconds
    while True:
        job = job_of(job_id, owner)
        if condition(job):
            return job
        if time.monotonic() > until:
            raise TimeoutError(f"{job_id} is {job.status} at {job.progress} after {seconds} s: {job.message}")
        time.sleep(0.1)


def wait_ended(job_id: str, seconds: float = 300, owner: str = OWNER) -> Any:
    return wait_until(job_id, lambda job: job.ended, seconds, owner)


def wait_step(job_id: str, step: int, seconds: float = 300) -> Any:
    return wait_until(job_id, lambda job: (job.progress or {}).get("step", 0) >= step or job.ended, seconds)


def trainers_of(pid: int) -> list[int]:
    """Child processes of a worker that run the trainer."""
    return [child for child in all_trainers() if parent_of(child) == pid]


def all_trainers() -> list[int]:
    """All trainers of this environment, recognized by their HOME."""
    home = f"HOME={os.environ['LLMTUNER_TEST_DIR']}/work/home".encode()
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if home in (entry / "environ").read_bytes().split(b"\0") and is_alive(int(entry.name)):
                    pids.append(int(entry.name))
            except OSError:
                continue
    return pids


def parent_of(pid: int) -> int:
    try:
        return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
