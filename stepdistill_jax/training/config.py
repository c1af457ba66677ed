"""The settings of a training run. Commands read them from gin, and Python users set them directly."""

import dataclasses
import math
import re
from typing import Any

from stepdistill_jax.data.objectives import Objective, resolve
from stepdistill_jax.errors import InputError
from stepdistill_jax.models.config import (
    ATTENTIONS,
    DTYPES,
    MAX_LENGTH,
    LoraConfig,
    ModelConfig,
    check_dtype,
    known_remat_policy,
)
from stepdistill_jax.models.sharding import LAYOUTS, Layout
from stepdistill_jax.runtime.checks import keep, number, of_type, one_of, refused, whole
from stepdistill_jax.tasks.mixtures import SINGLE
from stepdistill_jax.tasks.supervision import Supervision
from stepdistill_jax.training.extra_loss import ExtraLoss, PairedLoss
from stepdistill_jax.training.learning_rate import SHAPES, LearningRate
from stepdistill_jax.training.optimizer_function import OptimizerFunction

OPTIMIZERS = ("adamw", "adafactor")
OPTIMIZER = "an `OptimizerConfig`, or @name() of a function that returns an optax transformation"
NONFINITE = ("skip", "stop")
LOSS_MEANS = ("token", "example")
AUTO = "auto"
INT64 = 2**63 - 1  # largest seed


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Update rule and learning-rate schedule. The defaults follow Hsieh et al. 2023, appendix A.1.

    Attributes:
        name: the update rule, `adamw` or `adafactor`.
        schedule: `linear`, `cosine`, `rsqrt`, `constant`, or a `LearningRate` with further parameters, such as
            @cosine().
        warmup_steps (steps): number of steps until the learning rate reaches its peak. Used only if
            `schedule` is a name such as "linear".
        b1: AdamW's decay rate of the mean of the gradients.
        b2: AdamW's decay rate of the mean of the squared gradients.
        eps: AdamW's epsilon, added to the root of the second moment.
        eps_before_correction: whether AdamW adds `eps` before the bias correction, as the `AdamW` of
            transformers did. With `b2` 0.999, `eps` then has sqrt(1000) times as much effect in the first
            step; the difference vanishes over the run.
        weight_decay: weight decay of AdamW or Adafactor. The paper uses 0, unlike optax's default.
        clip_norm: largest global norm of the gradients. Gradients with a larger norm are scaled down to this
            norm.
        mu_dtype: type of AdamW's first moment, `float32` or `bfloat16`. The second moment is always float32:
            each step changes it only by the fraction 1 - b2, which bfloat16 would round away.
    """

    name: str = "adamw"
    schedule: str | LearningRate = "linear"
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    eps_before_correction: bool = False
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    mu_dtype: str = "float32"

    def __post_init__(self):
        of = "optimizer."
        one_of(f"{of}name", self.name, OPTIMIZERS)
        if not isinstance(self.schedule, LearningRate):
            one_of(f"{of}schedule", self.schedule, SHAPES)
        elif self.warmup_steps:
            shape = self.schedule.shape
            raise InputError(
                f"`{of}warmup_steps`: @{shape}() does not use it; set {shape}.warmup_steps instead"
            )
        one_of(f"{of}mu_dtype", self.mu_dtype, DTYPES)
        least = 1 if self.schedule == "rsqrt" else 0  # with 0, P sqrt(W / step) would be 0
        keep(self, whole, "warmup_steps", of=of, least=least)
        keep(self, number, "b1", "b2", of=of, least=0, below=1)
        keep(self, number, "eps", of=of, above=0)
        keep(self, number, "weight_decay", of=of, least=0)
        of_type(f"{of}eps_before_correction", self.eps_before_correction, bool, "True or False")
        if self.clip_norm != math.inf:
            keep(self, number, "clip_norm", of=of, above=0)
        if self.eps_before_correction and self.name != "adamw":
            raise InputError(
                f"`{of}eps_before_correction` must be False for {self.name}, which has no bias correction"
            )
        if self.mu_dtype != "float32" and self.name != "adamw":
            raise InputError(
                f"`{of}mu_dtype` must be float32 for {self.name}, which has no first moment"
            )

    @property
    def rate(self) -> LearningRate:
        """The schedule as a `LearningRate`."""
        if isinstance(self.schedule, LearningRate):
            return self.schedule
        return LearningRate(self.schedule, self.warmup_steps)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    In gin, each field up to `profile_steps` is a macro with the same name in capitals. The other fields are
    bound as `train.FIELD`.

    Attributes:
        task: name of a prepared dataset, or of a registered SeqIO task or mixture.
        task_module: Python module that registers the task, imported before the task is looked up.
        model_size: size of the model, `tiny` to `xxl`; T5Gemma has further sizes, such as `9b-2b`. Not
            used with `init_from`.
        init_from: where the initial weights come from: a model directory, another run's workdir (its
            best step), or a model of the Hugging Face hub, `OWNER/NAME`. None means random weights.
        init_rules: pairs (regular expression, name in `init_from` or None). The first expression that
            matches a parameter's complete name decides. If its pair has a name, the parameter is loaded
            under that name. If its pair has None, the parameter is drawn from the seed. A parameter that
            no expression matches is loaded under its own name.
        objectives: name of a predefined set (an arm), such as `step_by_step`, or your own objectives.
        task_objectives: maps each plain SeqIO task of a mixture to the objective that it trains, for
            instance {"own_label": "label", "own_rationale": "rationale"}. The value `single` trains all
            tasks of the mixture as one objective. Prepared datasets and tasks of `add_task` need no entry.
        extra_loss: a further term of the loss, such as @mutual_information(), or None.
        batch_size (examples): number of examples per step. The step uses all rows of each example.
        pack: whether several short rows are packed into one longer row. If False, rows are padded
            instead, separately for each objective.
        input_length (tokens): maximum length of an input. Longer inputs are truncated, and their number
            is logged.
        target_length (tokens): maximum length of a target. Longer targets are truncated, and their
            number is logged.
        row_input_length, row_target_length (tokens): input and target length of a packed row. `auto`
            chooses the lengths with which a step costs the fewest FLOPs.
        train_steps (steps): number of updates of the run.
        eval_every (steps): steps between two validations. The last step is always validated.
        checkpoint_every (steps): number of steps between two checkpoints. Each new best step and the last
            step are saved as well.
        learning_rate: peak learning rate of the optimizer's schedule.
        num_microbatches: number of microbatches into which a step's batch is split to save memory. Their
            gradients are added up.
        dtype: type of activations, `float32` or `bfloat16`; parameters and optimizer are always
            float32.
        dropout_broadcast: whether all positions of a row share one dropout mask, as in T5X. This needs
            fewer random numbers and adds noise to the gradient.
        attention: how attention is computed: `xla` (plain operations), `pallas` (one kernel), or
            `auto`, which uses the kernel on TPUs and GPUs if it compiles there and gives the results
            of `xla`.
        layout: the mesh of devices: a name (`data`, `fsdp`, `fsdp_tensor`, `tensor`, `hybrid`), or a
            `Layout` with the sizes of its axes.
        seed: seed of initial weights, dropout and data order.
        data_fraction: share of the train split to use. A smaller share is a subset of a larger one. For
            a dataset of `stepdistill prepare NAME --paper-exact`, the seed decides which examples are in
            the share, and the validation examples are drawn from this share.
        best_metric: validation metric that decides which step is best, named without `eval/validation/`.
            The largest value wins, or the smallest if the name starts with `loss`. None means the label
            accuracy, averaged over the parts of a mixture. Between equal values, the step with the lower
            label loss wins, then the earlier step.
        profile_steps (steps): first and last step to profile. The profile is written to
            `WORKDIR/profile`. None means no profile.
        optimizer: update rule and schedule, or your own function that returns an optax transformation.
        supervision: which labels and rationales the model is trained on.
        model_family: `t5_v1_0`, `t5_v1_1`, `mt5`, `byt5`, `umt5`, `ul2` or `t5gemma`; not used with
            `init_from`.
        dropout_rate: dropout rate of the complete model.
        max_decode_len (tokens): maximum length of a decoded label, including its end of sequence, in
            validation and in later predictions. None means the length of the longest train label, rounded
            up to a multiple of 8. If answers contain more than a label, this setting is ignored: the
            longest train target of the first objective decides.
        remat_policy: what the backward pass recomputes to save memory: `elementwise`, `minimal` or
            `full`.
        scan_layers: whether all layers are compiled as one loop. On a GPU, a step with False takes about
            four fifths of the time and 1.5 times the memory of a step with True. Compiling then takes
            minutes, so False suits runs of many hours.
        loss_mean: how an objective's loss is averaged over the global batch. `token` takes the mean over
            all target tokens, as in the paper. `example` takes the mean over the tokens of each target,
            then the mean over the targets.
        token_weights: maps an objective to a field of the train rows, which has a weight for each word of
            the target, e.g. {"rationale": "rationale_weights"}. None gives all words equal weights.
        lora: ranks of LoRA adapters, @lora(). If set, only the adapters are trained. None trains all weights.
        watchdog_medians: a step is stuck if it takes more than this many times the median of recent
            steps. The process then ends. 0 turns this off.
        watchdog_min_secs (seconds): no step counts as stuck before this time has passed. For the first step,
            for a validation and for a save, the limit is 12 times this time.
        on_nonfinite: what happens if a step's loss or gradient is not finite. `skip` leaves out the
            update, counts the step and records its examples; `stop` ends the run.
        max_consecutive_nonfinite (steps): after this many steps in a row that are not finite, the run
            returns to the last good checkpoint's parameters. The second time, the run ends.
        spike_factor: a step is recorded with its examples if its loss is above this many times the
            median loss of the last 100 steps. 0 turns this off.
        grace_secs (seconds): longest time from a stop signal to the end of the process, even if nothing
            could be saved. 0 means no limit.
    """

    task: str
    task_module: str | None = None
    model_size: str = "tiny"
    init_from: str | None = None
    init_rules: tuple[tuple[str, str | None], ...] | None = None
    objectives: str | tuple[Objective, ...] = "step_by_step"
    task_objectives: dict[str, str] | str | None = None
    extra_loss: ExtraLoss | None = None
    batch_size: int = 64
    pack: bool = True
    input_length: int = 512
    target_length: int = 256
    row_input_length: int | str = AUTO
    row_target_length: int | str = AUTO
    train_steps: int = 1000
    eval_every: int = 250
    checkpoint_every: int = 250
    learning_rate: float = 5e-5
    num_microbatches: int = 1
    dtype: str = ModelConfig.dtype
    dropout_broadcast: bool = ModelConfig.dropout_broadcast
    attention: str = "auto"
    layout: str | Layout = "data"
    seed: int = 0
    data_fraction: float = 1.0
    best_metric: str | None = None
    profile_steps: tuple[int, int] | None = None
    optimizer: OptimizerConfig | OptimizerFunction = dataclasses.field(
        default_factory=OptimizerConfig
    )
    supervision: Supervision = dataclasses.field(default_factory=Supervision)
    model_family: str = "t5_v1_1"
    dropout_rate: float = ModelConfig.dropout_rate
    max_decode_len: int | None = None
    remat_policy: str = ModelConfig.remat_policy
    scan_layers: bool = ModelConfig.scan_layers
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
        keep(self, whole, "batch_size", "train_steps", "eval_every", "checkpoint_every", least=1)
        keep(self, whole, "num_microbatches", least=1)
        keep(self, whole, "input_length", "target_length", least=1, most=MAX_LENGTH)
        keep(self, _row_length, "row_input_length", "row_target_length")
        if self.max_decode_len is not None:
            keep(self, whole, "max_decode_len", least=1, most=MAX_LENGTH)
        keep(self, whole, "seed", least=0, most=INT64)
        keep(self, number, "learning_rate", above=0)
        keep(self, number, "data_fraction", above=0, most=1)
        keep(self, number, "dropout_rate", least=0, below=1)
        for names, kind, words in (
            (("task", "model_size", "dtype", "attention"), str, "text"),
            (("model_family", "remat_policy"), str, "text"),
            (("task_module", "init_from", "best_metric"), str | None, "text or None"),
            (("pack", "dropout_broadcast", "scan_layers"), bool, "True or False"),
            (("lora",), LoraConfig | None, "a `LoraConfig` or None"),
            (("optimizer",), OptimizerConfig | OptimizerFunction, OPTIMIZER),
            (("supervision",), Supervision, "a `Supervision`"),
            (("layout",), str | Layout, "a layout's name or a `Layout`"),
        ):
            for name in names:
                of_type(name, getattr(self, name), kind, words)
        check_dtype(self.dtype)
        if isinstance(self.layout, str):
            one_of("layout", self.layout, LAYOUTS)
        object.__setattr__(self, "remat_policy", known_remat_policy(self.remat_policy))
        one_of("attention", self.attention, ATTENTIONS)
        if self.init_rules is not None:
            object.__setattr__(self, "init_rules", _init_rules(self.init_rules))
            if self.init_from is None:
                raise InputError(
                    "`init_rules`: also set `init_from`, whose parameters the rules select"
                )
        if self.profile_steps is not None:
            object.__setattr__(self, "profile_steps", _first_and_last(self.profile_steps))
            if self.profile_steps[0] > self.train_steps:
                raise InputError(
                    f"`profile_steps`: {list(self.profile_steps)} begins after the last step"
                    f" (`train_steps={self.train_steps}`)"
                )
        self._check_loss()
        self._check_task_objectives()
        one_of("on_nonfinite", self.on_nonfinite, NONFINITE)
        keep(self, whole, "max_consecutive_nonfinite", least=1)
        keep(self, number, "watchdog_medians", "spike_factor", least=0)
        # timers accept no longer times
        keep(self, number, "grace_secs", least=0, most=1e8)
        keep(self, number, "watchdog_min_secs", above=0, most=1e8)

    def _check_task_objectives(self) -> None:
        given = self.task_objectives
        if isinstance(given, dict):
            right = given and all(isinstance(x, str) for pair in given.items() for x in pair)
        else:
            right = given is None or given == SINGLE
        if not right:
            raise refused("task_objectives", f'{{"TASK": "OBJECTIVE"}}, "{SINGLE}" or None', given)

    def _check_loss(self) -> None:
        one_of("loss_mean", self.loss_mean, LOSS_MEANS)
        fields = self.token_weights
        if fields is not None and not (
            isinstance(fields, dict)
            and fields
            and all(isinstance(x, str) for f in fields.items() for x in f)
        ):
            raise refused("token_weights", '{"OBJECTIVE": "FIELD"} or None', fields)
        extra = self.extra_loss
        if extra is None:
            return
        of_type("extra_loss", extra, ExtraLoss, "an `ExtraLoss` of yours")
        try:
            hash(extra)
        except TypeError as error:
            raise InputError(
                f"`extra_loss`: {type(extra).__name__} must be a frozen dataclass of plain values: {error}"
            ) from None
        names = [o.name for o in resolve(self.objectives)]
        if extra.name in names:
            raise InputError(f"`extra_loss`: an objective already has the name {extra.name!r}")
        if self.pairs and len(names) < 2:
            raise InputError(
                f"`extra_loss`: {type(extra).__name__} pairs the targets of two objectives, but"
                f" `objectives` has only {names[0]}"
            )

    @property
    def pairs(self) -> bool:
        """Whether an example's targets must all be in one row of a batch, for the extra loss."""
        return isinstance(self.extra_loss, PairedLoss)

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as plain values, to write to `run.json` and to compare when a run is resumed."""
        extra = self.extra_loss and self.extra_loss.to_json()
        fields = dataclasses.asdict(self) | {"extra_loss": extra}
        if isinstance(self.optimizer, OptimizerFunction):
            fields["optimizer"] = self.optimizer.to_json()
        return fields


def _row_length(name: str, value: Any) -> int | str:
    if isinstance(value, str):
        if value == AUTO:
            return value
        raise refused(name, f'a whole number or "{AUTO}"', value)
    return whole(name, value, 1, MAX_LENGTH)


def _init_rules(rules: Any) -> tuple[tuple[str, str | None], ...]:
    wanted = '[("EXPRESSION", "NAME in `init_from`" or None), ...]'
    if not isinstance(rules, (list, tuple)) or not rules:
        raise refused("init_rules", wanted, rules)
    for rule in rules:
        if not isinstance(rule, (list, tuple)) or len(rule) != 2:
            raise refused("init_rules", wanted, rules)
        pattern, replacement = rule
        if not isinstance(pattern, str) or not isinstance(replacement, str | None):
            raise refused("init_rules", wanted, rules)
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(
                f"`init_rules`: {pattern!r} is not a regular expression ({error})"
            ) from None
    return tuple((pattern, replacement) for pattern, replacement in rules)


def _first_and_last(steps: Any) -> tuple[int, int]:
    whole = (
        isinstance(steps, (list, tuple)) and len(steps) == 2 and all(type(s) is int for s in steps)
    )
    if not whole or not 1 <= steps[0] <= steps[1]:
        raise refused("profile_steps", "[FIRST, LAST] with 1 <= FIRST <= LAST", steps)
    return steps[0], steps[1]
