"""Config of a search: `evspan sweep search=optuna`."""

from dataclasses import dataclass, field
from enum import Enum

from evspan.conf.errors import require

LOSS = "loss"  # the metric that is minimised; all others are maximised
PER_CLASS = "ap_class/"
METRICS = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar1",
    "ar10",
    "ar100",
    "ar_small",
    "ar_medium",
    "ar_large",
    LOSS,
)


def metric_name(key: str) -> str:
    """The key of a metric as the config names it: 'ap_small' -> 'AP_small'."""
    return key if key == LOSS else key[:2].upper() + key[2:]


class SearchMethod(Enum):
    """How the runs of a sweep are chosen."""

    none = "none"  # all combinations of values: a grid
    optuna = "optuna"


class Sampler(Enum):
    """How the values of a trial are drawn."""

    tpe = "tpe"  # Tree-structured Parzen Estimator: where earlier trials were good
    random = "random"


class Pruner(Enum):
    """Which trials end early."""

    none = "none"
    asha = "asha"  # asynchronous successive halving (Li et al., MLSys 2020)


@dataclass(kw_only=True)
class SearchConfig:
    """`search` of `evspan sweep`. With method=none the sweep is a grid."""

    method: SearchMethod = SearchMethod.none
    trials: int = 32  # in total; the same command with more continues the search
    # Key of the evaluations in metrics.jsonl: AP, AP50, AP_small, AR100, ..., AP_class/NAME; or
    # loss, the mean training loss since the last multiple of min_steps, which is minimised.
    metric: str = "AP"
    sampler: Sampler = Sampler.tpe
    startup_trials: int = 10  # random ones before TPE's
    seed: int = 0  # of the sampler
    pruner: Pruner = Pruner.asha
    # Trials are compared for the first time at this step, then at reduction_factor, its square, ...
    # times this step. 0: training.evaluate_every.
    min_steps: int = 0
    reduction_factor: int = 3  # the best 1/reduction_factor of the trials go on
    # Numbers of pruned trials that are trained to the end.
    resume: list[int] = field(default_factory=list)
    partition: str = ""  # of the controller's job, with cluster.detach; empty: that of the runs

    def __post_init__(self) -> None:
        self.resume = list(self.resume)
        for name, least in (("trials", 1), ("startup_trials", 0), ("min_steps", 0), ("seed", 0)):
            value = getattr(self, name)
            require(value >= least, f"search.{name} is {value}; give {least} or more")
        require(
            self.reduction_factor >= 2,
            f"search.reduction_factor is {self.reduction_factor}; give 2 or more",
        )
        names = ", ".join(metric_name(key) for key in METRICS)
        require(
            self.metric_key in METRICS or self.metric_key.startswith(PER_CLASS),
            f"search.metric is {self.metric}; choose from {names}, or {metric_name(PER_CLASS)}NAME "
            "for the AP of a class",
        )
        require(
            self.partition.isprintable(),
            "search.partition contains a control character; give the name of a partition",
        )

    @property
    def metric_key(self) -> str:
        """The key of the metric in metrics.jsonl."""
        if self.metric.lower().startswith(PER_CLASS):
            return PER_CLASS + self.metric[len(PER_CLASS) :]
        return self.metric.lower()

    @property
    def maximises(self) -> bool:
        """Whether a larger value of the metric is better."""
        return self.metric_key != LOSS
