"""The time of a run with all its attempts, for TensorBoard."""

import logging
import time
from pathlib import Path

from evspan.pipeline.engine.time_account import TimeAccount
from evspan.pipeline.history import read
from evspan.pipeline.parallel.world import World
from evspan.pipeline.tensorboard.time_tags import GOODPUT, QUEUE_HOURS, RANK_HOURS, tag_of_group
from evspan.pipeline.time_records import this_allocation
from evspan.pipeline.time_use import RunNow, TimeUse, read_time_use, with_attempt

logger = logging.getLogger(__name__)


class RunTime:
    """Adds this attempt to the attempts before it, whose records it reads once.

    Args:
        account: of rank 0, which is recorded in the run's folder already.
    """

    def __init__(self, run: Path, account: TimeAccount, world: World) -> None:
        self.account = account
        self.ranks = world.size
        self.gpu = world.device.type == "cuda"
        allocation = this_allocation(world.size)
        start = allocation.start if allocation else account.start
        self.launch_s = max(0.0, account.start - start)
        self.earlier = TimeUse()
        try:
            signs = [event["time"] for event in read(run)]
            run_now = RunNow(time.time(), is_running=True, signs=signs)
            self.earlier = read_time_use(run, run_now, before=start)
        except OSError as error:
            logger.warning("the time of earlier attempts is not known: %s", error)

    def scalars(self) -> dict[str, float]:
        """TensorBoard scalars: fractions of the allocated time, goodput, hours."""
        seconds = self.account.seconds()
        use = with_attempt(self.earlier, seconds, self.launch_s, self.ranks, gpu=self.gpu)
        allocated_s = use.allocated_s
        scalars = {
            GOODPUT: use.goodput or 0.0,
            QUEUE_HOURS: use.queue_s / 3600,
            RANK_HOURS: use.rank_hours,
        }
        for name, group_s in use.groups().items():
            scalars[tag_of_group(name)] = group_s / allocated_s if allocated_s else 0.0
        return scalars
