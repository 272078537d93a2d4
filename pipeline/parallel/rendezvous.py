"""Rank 0's store, through which the ranks find each other."""

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from evspan.conf.errors import LostRanksError
from evspan.pipeline.parallel.rank_env import RankInfo


@contextmanager
def joining(info: RankInfo, timeout_s: float) -> Iterator[timedelta]:
    """Around what ranks do with rank 0's store before their process group is open.

    Args:
        timeout_s: that ranks may begin after each other.

    Yields:
        The timeout of the store.

    Raises:
        LostRanksError: instead of torch's error, where the others have not joined in time.
    """
    try:
        yield timedelta(seconds=timeout_s)
    except dist.DistError as error:
        reason = str(error).splitlines()[0].partition(", keys: ")[0]
        raise LostRanksError(
            f"rank {info.rank} of {info.size} waited up to {timeout_s:g} s for the others to join "
            f"at {info.address}:{info.port} ({reason}). Their output may say why they did not "
            "start; `evspan doctor --nodes N` tells whether nodes reach each other; where ranks "
            "start slowly, raise parallel.timeout_s"
        ) from error


def rendezvous(info: RankInfo, timeout: timedelta) -> dist.Store:
    """Opens rank 0's store on rank 0, and connects to it on the others.

    Rank 0 listens on its address alone where that is certain to be the one that the others use: if
    all ranks are on this machine, or the address is a number. torchrun has a store of its own.
    """
    own = None
    if info.rank == 0 and not dist.is_torchelastic_launched():
        own = _listening_socket(info)
    store: dist.Store
    if own is not None:
        store = dist.TCPStore(
            info.address,
            info.port,
            info.size,
            is_master=True,
            timeout=timeout,
            multi_tenant=True,
            master_listen_fd=own.detach(),
        )
    else:
        store, _, _ = next(
            dist.rendezvous("env://", rank=info.rank, world_size=info.size, timeout=timeout)
        )
    store.set_timeout(timeout)
    return store


def _listening_socket(info: RankInfo) -> socket.socket | None:
    """A socket at rank 0's address; None: torch listens on all addresses of this machine."""
    family, kind, protocol, _, place = socket.getaddrinfo(
        info.address, info.port, type=socket.SOCK_STREAM
    )[0]
    address = ipaddress.ip_address(str(place[0]).partition("%")[0])
    is_local = info.size == info.local_size and address.is_loopback
    # Other machines may know a name by another address of this one.
    is_number = info.address == str(address) and not address.is_loopback
    if not (is_local or is_number):
        return None
    own = socket.socket(family, kind, protocol)
    try:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(place)
    except OSError:  # the address is not of this machine, or this process listens there already
        own.close()
        return None
    return own
