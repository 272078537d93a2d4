"""The weights that a run starts from: `checkpoint.init_from`.

What fits the run's model is copied, and the rest stays as the run's seed initialised it. The models
may differ in the classes of the head, in the attention and in the scales. Rows of classes are
matched by name, and what belongs to a scale by the stage of the backbone that feeds it.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from evspan.conf.errors import UserError
from evspan.conf.presets import size_names, size_of, size_preset
from evspan.conf.schema.prep import FrameConfig
from evspan.conf.schema.training import ModelConfig, TrainConfig
from evspan.conf.text import plural, printable
from evspan.pipeline.checkpoint_files import FOLDER, file_sum, find_weights, step_names
from evspan.pipeline.history import append
from evspan.pipeline.inference.trained_detector import check_fit
from evspan.pipeline.known_facts import NOTHING_KNOWN, KnownFacts
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.parallel.reductions import broadcast_json
from evspan.pipeline.rvt_checkpoint import is_published, open_weights
from evspan.pipeline.weights import Weights, read_weights
from torch import Tensor, nn

logger = logging.getLogger(__name__)
KEY = "checkpoint.init_from"
INIT_FROM = "init_from"  # key of meta.json: what the run started from
STARTED = "initialized"  # event in the history: the weights that the run started from
CLASS_ROWS = "yolox_head.cls_preds"
MOST_GROUPS = 6  # of tensors, in a line
MOST_DIFFERENCES = 4  # of config keys, in an error
# Tensors that belong to a scale, numbered from the finest.
OF_SCALE = re.compile(r"(yolox_head\.\w+\.|fpn\.\w+_attention_modules\.scale_)(\d+)(\..+)")
NO_NAME = re.compile(r"class_\d+")  # what a class without a name is called

# Keys that change the meaning or the shape of tensors that both models have.
ALWAYS_EQUAL = (
    "backbone.embed_dim",
    "backbone.dim_multiplier",
    "backbone.num_blocks",
    "backbone.dim_head",
    "backbone.mlp_ratio",
    "backbone.dws_conv",
    "fpn.depth",
)


@dataclass(frozen=True)
class Target:
    """What a run trains. classes: names by id; the head may have more. frames: of its data."""

    model: ModelConfig
    classes: Sequence[str]
    frames: FrameConfig


@dataclass(frozen=True)
class ClassRows:
    """Where the head's rows of classes come from.

    rows: (row of the model, row of the weights). number: rows of the model. by_position: whether
    the weights have no names to compare.
    """

    rows: list[tuple[int, int]]
    number: int
    by_position: bool = False

    @property
    def are_whole(self) -> bool:
        """Whether every row of the model has one of the weights."""
        return len(self.rows) == self.number


@dataclass
class InitialWeights:
    """The tensors to copy into a detector.

    Attributes:
        tensors: by the names of the detector, in its shapes; those of the class rows too, where
            all rows are in the weights.
        partial: by name, the tensors of which `classes.rows` are copied.
        new: names of the detector's tensors that are initialised, `partial` included.
        unused: names of tensors in the weights.
        notes: what a user should know of the choice, as parts of a line.
    """

    tensors: dict[str, Tensor]
    partial: dict[str, Tensor]
    classes: ClassRows
    new: list[str]
    unused: list[str]
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line: what was loaded, what is new and what is left over."""
        loaded = len(self.tensors)
        total = loaded + len(self.new)
        new = _grouped(self.new, {CLASS_ROWS: self._class_text()})
        parts = [f"loaded {loaded} of {total} tensors; new: {new}; unused: {_grouped(self.unused)}"]
        return "; ".join([*parts, *self.notes])

    def _class_text(self) -> str:
        matched = len(self.classes.rows)
        return f"{_classes(self.classes.number)}, {matched} matched by name"

    @torch.no_grad()
    def copy_into(self, detector: nn.Module) -> None:
        """Copies the tensors. The detector is on one rank as a whole."""
        state = detector.state_dict()
        for name, tensor in self.tensors.items():
            state[name].copy_(tensor)
        for name, tensor in self.partial.items():
            for row, source in self.classes.rows:
                state[name][row] = tensor[source]


# -- reading ---------------------------------------------------------------------------------------
def initialise(
    detector: nn.Module, config: TrainConfig, target: Target, rank: int
) -> dict[str, Any]:
    """Copies the weights that `checkpoint.init_from` names into a detector. A collective.

    Rank 0 chooses the file, checks and reports; every rank reads it.

    Returns:
        What the run started from, as JSON values: path, file, its xxh3, the step and the kind of
        the weights (raw or their moving average), and `loaded`, the line of
        `InitialWeights.summary`. The same on every rank.

    Raises:
        UserError: on every rank: there are no such weights, they are damaged or do not fit.
    """
    path = config.checkpoint.init_from
    answer: dict[str, Any] = {}
    weights = None
    if rank == 0:
        try:
            check_is_other_run(path, config.run_dir)
            file = find_initial_weights(path)
            weights = _read(file, target.model)
            initial = fit(weights, target, path)
            answer = {
                "path": path,
                "file": str(file),
                "xxh3": file_sum(file).xxh3,
                "step": weights.step,
                "weights": weights.kind,
                "loaded": initial.summary(),
            }
            logger.info("%s %s: %s", KEY, path, answer["loaded"])
            append(config.run_dir, STARTED, step=0, message=f"{path}: {answer['loaded']}")
        except (UserError, OSError) as error:
            answer = {"problem": _one_line(path, error)}
    answer = broadcast_json(answer, name="initial weights")
    if "problem" in answer:
        raise UserError(answer["problem"])
    if weights is None:
        weights = _read(Path(answer["file"]), target.model)
        initial = fit(weights, target, path)
    initial.copy_into(detector)
    return answer


def started_from(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What the run of a checkpoint started from, see `initialise`; {}: from random weights."""
    value = meta.get(INIT_FROM)
    return value if isinstance(value, dict) else {}


def check_initial_weights(config: TrainConfig, target: Target) -> None:
    """Checks what can be known before a rank starts. A run that continues does not read them.

    Raises:
        UserError: there are no such weights, they are the run's own, damaged, or do not fit.
    """
    path = config.checkpoint.init_from
    if config.run_dir:  # else it gets a new folder
        check_is_other_run(path, config.run_dir)
        if config.checkpoint.resume and step_names(Path(config.run_dir, FOLDER)):
            return
    try:
        fit(_read(find_initial_weights(path), target.model), target, path)
    except (UserError, OSError) as error:
        raise UserError(_one_line(path, error)) from error


def check_is_other_run(path: str, run_dir: str) -> None:
    """Checks that a run does not start from its own checkpoints.

    Raises:
        UserError: it does.
    """
    run = Path(run_dir).resolve()
    weights = Path(path).resolve()
    if weights == run or run / FOLDER in (weights, *weights.parents):
        raise UserError(
            f"{KEY} {path} is in run_dir {run_dir}, the run's own folder. To continue the run, "
            f"leave out {KEY}; to start again from its weights, give another run_dir"
        )


def find_initial_weights(path: str) -> Path:
    """The file that `path` names.

    Raises:
        UserError: there is none, or the checkpoint is damaged.
    """
    if not Path(path).exists():
        raise UserError(
            f"{KEY} is {path}, where there is nothing; name a run folder, a checkpoint, a weights "
            "file or a published .ckpt"
        )
    found = find_weights(Path(path))
    if found.message:
        logger.warning("%s", found.message)
    return found.file


def _read(file: Path, model: ModelConfig) -> Weights:
    """The weights in a file; `model` has what a published one does not show."""
    if not is_published(file):
        return read_weights(file)
    facts = NOTHING_KNOWN
    known = [size_preset(name)["backbone"]["embed_dim"] for name in size_names()]
    if model.backbone.embed_dim not in known:
        facts = KnownFacts(dim_head=model.backbone.dim_head)
    return open_weights(file, facts)


def _one_line(path: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if text.startswith(KEY) else f"{KEY} {path}: {text}"


# -- matching --------------------------------------------------------------------------------------
def fit(weights: Weights, target: Target, path: str) -> InitialWeights:
    """Finds which tensors of the weights the model takes. Reads no values.

    Args:
        path: of the weights, for errors.

    Raises:
        UserError: the weights are not those of their own model, or the model differs in more than
            classes, attention and scales.
    """
    check_fit(weights)
    _check_models(weights, target, path)
    with torch.device("meta"):
        shapes = Detector(target.model, target.frames.channels).state_dict()
    rows = match_classes(weights, target)
    renamed = _renamed(weights, target.model)
    initial = InitialWeights({}, {}, rows, [], [])
    for name, expected in shapes.items():
        tensor = renamed.get(name)
        if tensor is not None and name.startswith(f"{CLASS_ROWS}."):
            _add_class_rows(initial, name, tensor)
        elif tensor is not None and tensor.shape == expected.shape:
            initial.tensors[name] = tensor
        else:
            initial.new.append(name)
    taken = initial.tensors.keys() | initial.partial.keys()
    initial.unused += [name for name in renamed if name not in taken]
    initial.notes += _notes(weights, target, rows, path)
    return initial


def _add_class_rows(initial: InitialWeights, name: str, tensor: Tensor) -> None:
    if initial.classes.are_whole:
        order = [source for _, source in initial.classes.rows]
        initial.tensors[name] = tensor[order]
    else:
        initial.partial[name] = tensor
        initial.new.append(name)


def match_classes(weights: Weights, target: Target) -> ClassRows:
    """Finds the row of the weights for each class of the model, by name.

    Upper and lower case, spaces, - and _ make no difference. Rows without a name on either side
    are matched by position, and so are all rows where the weights have no names, if their number
    is that of the model.
    """
    number = target.model.head.num_classes
    available = weights.model.head.num_classes
    names = [_key(name) for name in weights.classes[:available]]
    current = [_key(name) for name in target.classes[:number]]
    if number == available and names != current and all(map(NO_NAME.fullmatch, names)):
        return ClassRows([(row, row) for row in range(number)], number, by_position=True)
    rows = []
    for row in range(number):
        is_named = row < len(current)
        if is_named and current[row] in names:
            rows.append((row, names.index(current[row])))
        elif not is_named and len(names) <= row < available:
            rows.append((row, row))
    return ClassRows(rows, number)


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().casefold())


def _renamed(weights: Weights, model: ModelConfig) -> dict[str, Tensor]:
    """The tensors by the names that the model has for them, or would have."""
    before = weights.model.fpn.in_stages
    now = model.fpn.in_stages
    if before == now:
        return weights.tensors
    renamed = {}
    for name, tensor in weights.tensors.items():
        match = OF_SCALE.fullmatch(name)
        if match:
            stage = before[int(match[2])]
            number = f"{now.index(stage)}" if stage in now else f"of_stage_{stage}"
            name = f"{match[1]}{number}{match[3]}"
        renamed[name] = tensor
    return renamed


def _check_models(weights: Weights, target: Target, path: str) -> None:
    ours = _values(target.model)
    theirs = _values(weights.model)
    keys = list(ALWAYS_EQUAL)
    if target.model.fpn.enable_small_object_attention and (
        weights.model.fpn.enable_small_object_attention
    ):
        keys.append("fpn.identity_init")
    if target.model.fpn.looks_back and weights.model.fpn.looks_back:
        keys.append("fpn.temporal_window")
    different = [key for key in keys if ours[key] != theirs[key]]
    problems = [f"model.{key} is {ours[key]}, theirs {theirs[key]}" for key in different]
    remedies = [f"model.{key}={_override(theirs[key])}" for key in different]
    size = size_of(weights.model)
    if size not in ("custom", size_of(target.model)):
        of_size = {"backbone.embed_dim", "backbone.dim_head", "fpn.depth"}
        rest = [f"model.{key}={_override(theirs[key])}" for key in different if key not in of_size]
        remedies = [f"size={size}", *rest]
    if weights.frames.channels != target.frames.channels:
        problems.append(f"the frames have {target.frames.bins} bins, theirs {weights.frames.bins}")
        remedies.append(f"shards of frames.bins={weights.frames.bins}")
    if not problems:
        return
    shown = problems[:MOST_DIFFERENCES]
    if len(problems) > len(shown):
        shown.append(f"{len(problems) - len(shown)} more")
    raise UserError(
        f"{KEY} {path}: the weights are of another model: {'; '.join(shown)}. Train that model "
        f"({' '.join(remedies)}), or name other weights"
    )


def _values(model: ModelConfig) -> dict[str, Any]:
    """Dotted key -> value."""
    values: dict[str, Any] = {}
    for part, keys in asdict(model).items():
        values |= {f"{part}.{key}": value for key, value in keys.items()}
    values["fpn.depth"] = round(round(3 * model.fpn.depth) / 3, 2)  # it counts bottlenecks
    return values


def _override(value: Any) -> str:
    """A value as in an override of Hydra."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- texts -----------------------------------------------------------------------------------------
def _notes(weights: Weights, target: Target, rows: ClassRows, path: str) -> list[str]:
    notes = []
    if weights.average is not None:
        notes.append(f"weights: {weights.kind}")
    if rows.by_position:
        notes.append(f"{_classes(rows.number)} by position, since the weights have no names")
    elif Path(path).is_file() and is_published(Path(path)):
        names = ", ".join(map(printable, weights.classes))
        notes.append(f"its classes are taken as {names}")
    if rows.are_whole and any(row != source for row, source in rows.rows):
        order = "in another order"
        if weights.model.head.num_classes != rows.number:
            order = f"of its {weights.model.head.num_classes}"
        notes.append(f"rows of {_classes(rows.number)} {order}, matched by name")
    split = weights.model.backbone.partition_split_32
    if split != target.model.backbone.partition_split_32:
        notes.append(
            f"trained with model.backbone.partition_split_32={split}, which this run has as "
            f"{target.model.backbone.partition_split_32}"
        )
    frames = _frame_differences(weights.frames, target.frames)
    if frames:
        notes.append(f"trained on other frames: {frames}")
    return notes


def _frame_differences(theirs: FrameConfig, ours: FrameConfig) -> str:
    values = asdict(ours)
    parts = []
    for key, value in asdict(theirs).items():
        if value != values[key]:
            parts.append(f"{key} {_text(value)}, here {_text(values[key])}")
    return ", ".join(parts)


def _text(value: Any) -> str:
    return str(getattr(value, "name", value))


def _classes(number: int) -> str:
    return "1 class" if number == 1 else f"{number} classes"


def _grouped(names: Iterable[str], texts: Mapping[str, str] | None = None) -> str:
    """Tensors by module: 'fpn.C3_p3 (12 tensors), yolox_head.stems (6 tensors)'; 'none'.

    Args:
        texts: by module, what to write instead of the number of tensors.
    """
    counts: dict[str, int] = {}
    for name in names:
        module = ".".join(name.split(".")[:2])
        counts[module] = counts.get(module, 0) + 1
    parts = []
    for module, count in list(counts.items())[:MOST_GROUPS]:
        text = (texts or {}).get(module) or plural(count, "tensor")
        parts.append(f"{module} ({text})")
    if len(counts) > MOST_GROUPS:
        parts.append(f"{plural(len(counts) - MOST_GROUPS, 'more module')}")
    return ", ".join(parts) or "none"
