"""A run's secret, which the ranks share: names and signs what they write into rank 0's store.

torch's store has no authentication. Who reaches its port can read, change and list all keys. So
what Evspan itself writes there is signed, and a value without a valid signature counts as missing;
keys, also those of the process groups, are below a prefix that follows from the secret.

Where a rank finds the secret:

    EVSPAN_RUN_SECRET       set by `evspan` for ranks on one machine and in SLURM jobs
    RUN/.rendezvous-XXXX    created by rank 0 for the ranks of torchrun and srun, which share the
                            run's folder; read by its owner only, removed when all ranks have joined

Without a run folder (`evspan evaluate` under torchrun) there is none unless the variable is set.
"""

import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from evspan.conf.errors import ConfigError
from evspan.conf.private_files import create_private_file, read_private_file
from evspan.conf.secret_values import RUN_SECRET, new_secret

FILE_S = 60.0  # a shared file system may show a new file this late
POLL_S = 0.1
FILE_NAME = ".rendezvous-"
MOST_BYTES = 1 << 10  # of the file
MOST_VALUE_BYTES = 1 << 14  # of a signed value
SIGNATURE = 2 * hashlib.sha256().digest_size  # as hexadecimal digits


class RunSecret:
    """Names and signs values. text: the secret; empty: there is none, and nothing is hidden."""

    def __init__(self, text: str = "") -> None:
        self._key = text.encode()

    def __repr__(self) -> str:
        """Without the secret."""
        return "RunSecret()"

    @property
    def prefix(self) -> str:
        """Of all keys of the run."""
        return hmac.new(self._key, b"prefix", hashlib.sha256).hexdigest()[:32]

    def sign(self, key: str, value: str) -> str:
        """The value as it is written under `key`."""
        return self._signature(key, value.encode()) + value

    def verified(self, key: str, signed: bytes) -> str | None:
        """The value that a rank of this run wrote under `key`; None if none did."""
        if not SIGNATURE <= len(signed) <= MOST_VALUE_BYTES:
            return None
        content = signed[SIGNATURE:]
        if not hmac.compare_digest(signed[:SIGNATURE], self._signature(key, content).encode()):
            return None
        return content.decode(errors="replace")

    def _signature(self, key: str, content: bytes) -> str:
        return hmac.new(self._key, key.encode() + b"\0" + content, hashlib.sha256).hexdigest()


@contextmanager
def shared_secret(store: dist.Store, rank: int, run: Path | None) -> Iterator[RunSecret]:
    """The secret of all ranks; while open, ranks that have not read it can do so.

    Args:
        store: rank 0's, not yet used by others.
        run: the run's folder, which all ranks see; None: there is none.

    Raises:
        ConfigError: rank 0's file does not appear in this rank's run folder.
        ForeignFileError: the file is another user's.
    """
    text = os.environ.get(RUN_SECRET, "")
    if text or run is None:
        yield RunSecret(text)
        return
    # torchrun's store outlives ranks that it starts again.
    key = f"evspan/secret/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if rank > 0:
        yield RunSecret(_read(run, store.get(key)))
        return
    file = run / f"{FILE_NAME}{secrets.token_hex(8)}"
    run.mkdir(parents=True, exist_ok=True)
    text = new_secret()
    create_private_file(file, text)
    try:
        store.set(key, file.name)
        yield RunSecret(text)
    finally:
        file.unlink(missing_ok=True)


def _read(run: Path, announced: bytes) -> str:
    """The secret in the file that rank 0 has announced."""
    name = announced[:MOST_BYTES].decode(errors="replace")
    if not re.fullmatch(re.escape(FILE_NAME) + "[0-9a-f]{16}", name):
        raise ConfigError(
            f"rank 0's store names {name!r} as the file with the run's secret, which no rank of "
            "this run has written; run the same command again, on a port that no one else uses "
            "(MASTER_PORT)"
        )
    deadline = time.monotonic() + FILE_S
    while True:
        try:
            return read_private_file(run / name, most_bytes=MOST_BYTES).decode("ascii", "replace")
        except FileNotFoundError as error:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"rank 0 has created {name} in the run's folder, and this rank does not see it "
                    f"in {run.absolute()} after {FILE_S:.0f} s; name a run_dir that is the same "
                    "folder on all machines"
                ) from error
        os.utime(run)  # makes NFS read the folder again
        time.sleep(POLL_S)
