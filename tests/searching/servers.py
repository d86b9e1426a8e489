"""Servers that hold the storage of a search, started for a test and stopped behind it: PostgreSQL, Optuna's proxy."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

_PLACES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
_SECONDS = 60
_PROXY = """
import sys
from optuna.storages import JournalStorage, run_grpc_proxy_server
from optuna.storages.journal import JournalFileBackend

run_grpc_proxy_server(JournalStorage(JournalFileBackend(sys.argv[1])), host="localhost", port=int(sys.argv[2]))
"""


@contextmanager
def serve(kind: str, folder: Path) -> Iterator[tuple[str, str]]:
    """Start what a kind of storage needs; give its address for workers, and one at which the same can be looked at.

    Args:
        kind: "journal", "sqlite", "postgresql" or "grpc"; a test whose server is not installed is skipped.
        folder: where files go.
    """
    plain = {"journal": f"journal://{folder}/search.log", "sqlite": f"sqlite:///{folder}/search.db"}
    if kind in plain:
        yield plain[kind], plain[kind]
    elif kind == "postgresql":
        pytest.importorskip("psycopg")
        with _postgresql() as address:
            yield address, address
    else:
        if importlib.util.find_spec("grpc") is None:  # not imported: processes fork from this one
            pytest.skip("grpcio is not installed")
        with _proxy(folder / "search.log") as address:  # looked at as a file: a process with a channel must not fork
            yield address, f"journal://{folder}/search.log"


@contextmanager
def _postgresql() -> Iterator[str]:
    """Start PostgreSQL on an empty folder, as another user where this one is root, which it refuses."""
    folder = next((str(place) for place in _PLACES if (place / "initdb").exists()), None)
    found = {name: shutil.which(name, path=folder) for name in ("initdb", "postgres", "pg_isready")}
    if None in found.values():
        pytest.skip("no PostgreSQL is installed; Debian's package is postgresql")
    user = ["runuser", "-u", "nobody", "--"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="search-") as place:
        if user:
            shutil.chown(place, "nobody")
        run = [*user, str(found["initdb"]), "-D", f"{place}/data", "-A", "trust", "-U", "search", "--no-sync"]
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL, cwd=place)
        port = str(_free_port())
        server = [*user, str(found["postgres"]), "-D", f"{place}/data", "-p", port, "-k", place, "-F"]
        asked = [str(found["pg_isready"]), "-q", "-h", "localhost", "-p", port, "-U", "search"]
        with _running(server, asked, place):
            yield f"postgresql+psycopg://search@localhost:{port}/postgres"


@contextmanager
def _proxy(journal: Path) -> Iterator[str]:
    """Start Optuna's proxy of a journal."""
    port = str(_free_port())
    asked = [sys.executable, "-c", f"import socket; socket.create_connection(('localhost', {port}), 1)"]
    with _running([sys.executable, "-W", "ignore", "-c", _PROXY, str(journal), port], asked, str(journal.parent)):
        yield f"grpc://localhost:{port}"


@contextmanager
def _running(command: Sequence[str], asked: Sequence[str], folder: str) -> Iterator[None]:
    """Run a server until the block ends; the block begins when another command says that it answers."""
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            began = time.monotonic()
            while subprocess.run(asked, check=False, stderr=subprocess.DEVNULL).returncode:
                assert server.poll() is None, f"{command} has ended"
                assert time.monotonic() < began + _SECONDS, f"{command} does not answer"
                time.sleep(0.1)
            yield
        finally:
            server.terminate()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
