"""What decides a training run; `commands/` fills it from gin, Python users directly."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from stepdistill_jax.data.objectives import Objective, resolve
from stepdistill_jax.errors import InputError, nearest
from stepdistill_jax.models.config import MAX_LENGTH, LoraConfig, T5Config, known_remat_policy
from stepdistill_jax.models.sharding import Layout
from stepdistill_jax.tasks.supervision import Supervision
from stepdistill_jax.training.extra_loss import ExtraLoss

OPTIMIZERS = ("adamw", "adafactor")
NONFINITE = ("skip", "stop")
LOSS_MEANS = ("token", "example")
INT32, INT64, FLOAT32 = 2**31 - 1, 2**63 - 1, 3.4e38  # what steps, seeds and rates are kept in


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Update rule and schedule; the defaults are the paper's (Hsieh et al. 2023, appendix A.1).

    Attributes:
        name: `adamw` or `adafactor`.
        schedule: `linear` (to 0 at `train_steps`) or `constant`.
        warmup_steps: steps of linear rise before it.
        b1, b2, eps: AdamW's.
        weight_decay: of either; the paper's is 0, optax's default is not.
        clip_norm: global gradient norm above which gradients are scaled down.
        mu_dtype: AdamW's first moment is kept as `float32` or `bfloat16` (optax's name); the second,
            an average of squares over 1 / (1 - b2) steps, would stop to move in bfloat16.
    """

    name: str = "adamw"
    schedule: str = "linear"
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    mu_dtype: str = "float32"

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise InputError(
                f"optimizer: one of {', '.join(OPTIMIZERS)} is wanted, got {self.name!r}"
                f"{nearest(self.name, OPTIMIZERS)}"
            )
        if self.schedule not in ("linear", "constant"):
            raise InputError(
                f"OptimizerConfig.schedule: linear or constant is wanted, got {self.schedule!r}"
            )
        where = "optimizer."
        _check_whole(f"{where}warmup_steps", self.warmup_steps, 0)
        for name in ("b1", "b2"):
            _check_number(f"{where}{name}", getattr(self, name), lambda x: 0 <= x < 1, "0 <= x < 1")
        _check_number(f"{where}eps", self.eps, lambda x: x > 0, "x > 0")
        _check_number(f"{where}weight_decay", self.weight_decay, lambda x: x >= 0, "x >= 0")
        if self.clip_norm != math.inf:
            _check_number(f"{where}clip_norm", self.clip_norm, lambda x: x > 0, "x > 0")
        if self.mu_dtype not in ("float32", "bfloat16"):
            raise InputError(
                f"OptimizerConfig.mu_dtype: float32 or bfloat16 is wanted, got {self.mu_dtype!r}"
            )
        if self.mu_dtype != "float32" and self.name != "adamw":
            raise InputError(
                f"OptimizerConfig.mu_dtype: {self.name} keeps no first moment; leave it at float32"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run. Each field but the last thirteen is the gin macro of the same name in capitals.

    Attributes:
        task: a prepared dataset, or a registered SeqIO task or mixture.
        task_module: module that registers it, imported before it is looked up.
        model_size: `tiny` ... `xxl`; not used where `init_from` brings a configuration.
        init_from: model directory to start from; None is random.
        objectives: an arm's name or objectives.
        extra_loss: one more term of the loss; None adds nothing to the compiled step.
        batch_size: examples (not rows) a step.
        pack: several rows in one; False pads each objective to its own length.
        input_length, target_length: tokens of a packed row, and where longer rows are cut.
        train_steps, eval_every, checkpoint_every: steps.
        learning_rate: peak.
        num_microbatches: slices of a step, whose gradients are added up.
        dtype: of activations.
        layout: name or sizes of the mesh.
        seed: of init, dropout and data order.
        data_fraction: share of the train split that is used; smaller shares are subsets of larger.
        profile_steps: first and last step of a profile in `WORKDIR/profile`; None writes none.
        optimizer: update rule and schedule.
        supervision: which label and rationales are trained on (LABEL_SOURCE, RATIONALES).
        model_family: `t5_v1_0`, `t5_v1_1`, `mt5`, `byt5` or `umt5`; not used with `init_from`.
        dropout_rate: the same everywhere in the model.
        remat_policy: `elementwise`, `minimal` or `full`.
        loss_mean: an objective's loss is the mean over its target tokens in the global batch
            (`token`, the paper's), or over its targets of each one's mean (`example`).
        token_weights: for names of objectives, the field of the train rows that has a weight for each
            word of the target, e.g. {"rationale": "rationale_weights"}; None weighs all alike.
        lora: trains adapters of these ranks and nothing else; None trains every weight.
        watchdog_medians: a step that takes so many times the median of the recent ones is stuck, and
            the process ends; 0 never.
        watchdog_min_secs: but not before so many seconds; 12 times as many for the first step, a
            validation and a save.
        on_nonfinite: a step whose loss or gradient is not finite is `skip`ped (no update; counted,
            and its examples reported), or the run will `stop` there.
        max_consecutive_nonfinite: after so many in a row the run goes on from the last good
            checkpoint's parameters; the second time it stops.
        spike_factor: a loss above so many times the median of the last 100 steps is reported with
            its examples; 0 never.
        grace_secs: after a stop signal the process ends within so many seconds, saved or not; 0 is
            no limit.
    """

    task: str
    task_module: str | None = None
    model_size: str = "tiny"
    init_from: str | None = None
    objectives: str | tuple[Objective, ...] = "step_by_step"
    extra_loss: ExtraLoss | None = None
    batch_size: int = 64
    pack: bool = True
    input_length: int = 512
    target_length: int = 256
    train_steps: int = 1000
    eval_every: int = 250
    checkpoint_every: int = 250
    learning_rate: float = 5e-5
    num_microbatches: int = 1
    dtype: str = T5Config.dtype
    layout: str | Layout = "data"
    seed: int = 0
    data_fraction: float = 1.0
    profile_steps: tuple[int, int] | None = None
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    supervision: Supervision = dataclasses.field(default_factory=Supervision)
    model_family: str = "t5_v1_1"
    dropout_rate: float = T5Config.dropout_rate
    remat_policy: str = T5Config.remat_policy
    loss_mean: str = "token"
    token_weights: dict[str, str] | None = None
    lora: LoraConfig | None = None
    watchdog_medians: float = 20.0
    watchdog_min_secs: float = 600.0
    on_nonfinite: str = "skip"
    max_consecutive_nonfinite: int = 5
    spike_factor: float = 0.0
    grace_secs: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "objectives", resolve(self.objectives))
        for name in (
            "batch_size",
            "train_steps",
            "eval_every",
            "checkpoint_every",
            "num_microbatches",
        ):
            _check_whole(name.upper(), getattr(self, name), 1)
        for name in ("input_length", "target_length"):
            _check_whole(name.upper(), getattr(self, name), 1, MAX_LENGTH)
        _check_whole("SEED", self.seed, 0, INT64)
        for name in ("task", "model_size", "dtype", "model_family", "remat_policy"):
            if not isinstance(value := getattr(self, name), str):
                raise InputError(f"{name.upper()}: text is wanted, got {value!r}")
        object.__setattr__(self, "remat_policy", known_remat_policy(self.remat_policy))
        for name in ("task_module", "init_from"):
            if not isinstance(value := getattr(self, name), str | None):
                raise InputError(f"{name.upper()}: text or None is wanted, got {value!r}")
        if not isinstance(self.pack, bool):
            raise InputError(f"PACK: True or False is wanted, got {self.pack!r}")
        rate, share, dropout = self.learning_rate, self.data_fraction, self.dropout_rate
        _check_number("LEARNING_RATE", rate, lambda x: x > 0, "x > 0")
        _check_number("DATA_FRACTION", share, lambda x: 0 < x <= 1, "0 < x <= 1")
        _check_number("train.dropout_rate", dropout, lambda x: 0 <= x < 1, "0 <= x < 1")
        for name, kind, wanted in (
            ("lora", LoraConfig | None, "@lora() or None"),
            ("optimizer", OptimizerConfig, "@optimizer()"),
            ("supervision", Supervision, "@supervision()"),
        ):
            if not isinstance(value := getattr(self, name), kind):
                raise InputError(f"train.{name}: {wanted} is wanted, got {value!r}")
        if not isinstance(self.layout, str | Layout):
            raise InputError(f"LAYOUT: a layout's name or @Layout() is wanted, got {self.layout!r}")
        if self.profile_steps is not None:
            object.__setattr__(self, "profile_steps", _first_and_last(self.profile_steps))
            if self.profile_steps[0] > self.train_steps:
                raise InputError(
                    f"PROFILE_STEPS: {list(self.profile_steps)} begins after the last step"
                    f" (TRAIN_STEPS={self.train_steps})"
                )
        self._check_loss()
        self._check_trouble()

    def _check_loss(self) -> None:
        if self.loss_mean not in LOSS_MEANS:
            raise InputError(
                f"train.loss_mean: one of {', '.join(LOSS_MEANS)} is wanted, got"
                f" {self.loss_mean!r}{nearest(str(self.loss_mean), LOSS_MEANS)}"
            )
        fields = self.token_weights
        if fields is not None and not (
            isinstance(fields, dict)
            and fields
            and all(isinstance(x, str) for f in fields.items() for x in f)
        ):
            raise InputError(
                f'train.token_weights: {{"OBJECTIVE": "FIELD"}} or None is wanted, got {fields!r}'
            )
        extra = self.extra_loss
        if extra is None:
            return
        if not isinstance(extra, ExtraLoss):
            raise InputError(f"EXTRA_LOSS: an ExtraLoss (@my_loss()) is wanted, got {extra!r}")
        try:
            hash(extra)
        except TypeError as error:
            raise InputError(
                f"EXTRA_LOSS: {type(extra).__name__} must be a frozen dataclass of plain values: {error}"
            ) from None
        if extra.name in {o.name for o in resolve(self.objectives)}:
            raise InputError(f"EXTRA_LOSS: an objective is called {extra.name!r}, too")

    def _check_trouble(self) -> None:
        if self.on_nonfinite not in NONFINITE:
            raise InputError(
                f"train.on_nonfinite: one of {', '.join(NONFINITE)} is wanted, got"
                f" {self.on_nonfinite!r}{nearest(str(self.on_nonfinite), NONFINITE)}"
            )
        _check_whole("train.max_consecutive_nonfinite", self.max_consecutive_nonfinite, 1)
        for name in ("watchdog_medians", "spike_factor"):
            _check_number(f"train.{name}", getattr(self, name), lambda x: x >= 0, "a number from 0")
        # a timer cannot be set to more
        secs = self.grace_secs
        _check_number("train.grace_secs", secs, lambda x: 0 <= x <= 1e8, "a number from 0 to 1e8")
        secs = self.watchdog_min_secs
        _check_number("train.watchdog_min_secs", secs, lambda x: 0 < x <= 1e8, "0 < x <= 1e8")

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `run.json` keeps them and as a resume compares them."""
        extra = self.extra_loss and self.extra_loss.to_json()
        return dataclasses.asdict(self) | {"extra_loss": extra}


def _check_whole(name: str, value: Any, least: int, most: int = INT32) -> None:
    if type(value) is not int or value < least:
        wanted = "above 0" if least else "from 0"
        raise InputError(f"{name}: a whole number {wanted} is wanted, got {value!r}")
    if value > most:
        raise InputError(f"{name}: at most {most} is wanted, got {value!r}")


def _check_number(name: str, value: Any, is_good: Callable[[float], bool], wanted: str) -> None:
    """`is_good` is asked about numbers alone; NaN and what float32 cannot hold never pass."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name}: a number is wanted, got {value!r}")
    if not abs(value) <= FLOAT32 or not is_good(value):
        raise InputError(f"{name}: {wanted} is wanted, got {value!r}")


def _first_and_last(steps: Any) -> tuple[int, int]:
    whole = (
        isinstance(steps, (list, tuple)) and len(steps) == 2 and all(type(s) is int for s in steps)
    )
    if not whole or not 1 <= steps[0] <= steps[1]:
        raise InputError(
            f"PROFILE_STEPS: [FIRST, LAST] with 1 <= FIRST <= LAST is wanted, got {steps!r}"
        )
    return steps[0], steps[1]
