"""What an experiment file may say: frozen, validated, unknown keys refused (`compose.py` reads the files)."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, field_validator, model_validator

RouterName = str


def _rational(value: object) -> Fraction:
    """Exact: 1.3 is 13/10, "4/3" is 4/3."""
    try:
        return Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{value!r} is not a number or a fraction such as 13/10") from None


Rational = Annotated[Fraction, BeforeValidator(_rational), PlainSerializer(str)]
"""A number that every rank computes with exactly."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MoeConfig(Section):
    """The layer's function: what `parallel` never changes."""

    num_experts: int = Field(default=8, gt=0)
    top_k: int = Field(default=2, gt=0)
    expert_hidden_size: int = Field(default=512, gt=0)
    activation: Literal["swiglu", "gelu", "swiglu_clamped"] = "swiglu"
    swiglu_alpha: float = 1.702
    swiglu_limit: float = Field(default=7.0, gt=0)
    expert_bias: bool = False
    router_bias: bool = False
    router: RouterName = "topk"
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    softmax_order: Literal["before_topk", "after_topk"] = "before_topk"
    norm_topk_prob: bool = True
    route_scale: float = 1.0
    router_dtype: Literal["float32", "float64"] = "float32"
    num_groups: int = Field(default=1, gt=0)
    group_top_k: int = Field(default=1, gt=0)
    group_score_top: int = Field(default=2, gt=0)
    inner_router: Literal["random", "topk", "grap"] = "random"
    score_scale: Literal["none", "sqrt"] = "none"
    score_relu: bool = False
    affinity_mass: float | None = Field(default=None, gt=0, le=1)
    router_jitter: float = Field(default=0.0, ge=0, lt=1)
    nan_policy: Literal["raise", "skip"] = "raise"
    bias_update_rate: float = Field(default=0.0, ge=0)
    bias_update_rule: Literal["sign", "proportional"] = "sign"
    aux_loss_coeff: float = Field(default=0.01, ge=0)
    aux_loss_scope: Literal["sequence", "global"] = "sequence"
    aux_loss_layers: Literal["separate", "concatenated"] = "separate"
    z_loss_coeff: float = Field(default=0.0, ge=0)
    entropy_loss_coeff: float = 0.0
    locality_loss_coeff: float = Field(default=0.0, ge=0)
    locality_nodes: int = Field(default=1, gt=0)
    locality_expert_nodes: tuple[int, ...] | None = None
    locality_smoothing: float = Field(default=0.05, gt=0, lt=1)
    locality_scope: Literal["node", "sequence"] = "node"
    locality_gradient: Literal["model", "router"] = "model"
    locality_start_step: int = Field(default=0, ge=0)
    locality_ramp_steps: int = Field(default=0, ge=0)
    capacity_factor: float | str | None = None
    capacity_rule: Literal["factor", "angle_frozen", "angle_step"] = "factor"
    capacity_quantile: float = Field(default=0.1, gt=0, lt=1)
    min_capacity: int = Field(default=1, gt=0)
    drop_policy: Literal["position", "score"] = "score"
    capacity_group: Literal["sequence", "rank"] = "sequence"
    num_shared_experts: int = Field(default=0, ge=0)
    shared_expert_hidden_size: int | None = Field(default=None, gt=0)
    shared_expert_gate: bool = False
    num_heads: int = Field(default=1, gt=0)
    head_dim: int | None = Field(default=None, gt=0)

    @property
    def gates(self) -> int:
        """Column blocks of an expert's up matrix: gate and linear, or one (gelu)."""
        return 1 if self.activation == "gelu" else 2

    @model_validator(mode="after")
    def _fits(self) -> MoeConfig:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"moe.top_k={self.top_k} exceeds moe.num_experts={self.num_experts}; choose top_k <= num_experts"
            )
        if self.capacity_factor is not None and _rational(self.capacity_factor) <= 0:
            raise ValueError(f"moe.capacity_factor={self.capacity_factor} drops everything; choose one above 0 or null")
        return self


class RopeScaling(Section):
    """YaRN: slow rotary frequencies are divided by `factor`, fast ones stay, those between are mixed."""

    factor: float = Field(gt=0)
    original_length: int = Field(gt=0)
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    truncate: bool = True
    attention_factor: float | None = Field(default=None, gt=0)


class ModelConfig(Section):
    """A pre-norm decoder around the MoE layer.

    qk_norm: true norms each head by itself, `whole` all heads at once (OLMoE). attention_bias: of q, k and v.
    attention_sinks: a learned logit per head in the softmax, without a value (gpt-oss). sliding_window: how far back
    a token sees, in `sliding_layers` (null: in all). init_from: folder of a checkpoint to start from.
    """

    vocab_size: int = Field(default=257, gt=0)
    hidden_size: int = Field(default=256, gt=0)
    num_layers: int = Field(default=4, gt=0)
    num_attention_heads: int = Field(default=4, gt=0)
    num_key_value_heads: int | None = Field(default=None, gt=0)
    attention_head_dim: int | None = Field(default=None, gt=0)
    num_dense_layers: int = Field(default=0, ge=0)
    dense_hidden_size: int | None = Field(default=None, gt=0)
    dense_activation: Literal["swiglu", "gelu"] = "swiglu"
    qk_norm: bool | Literal["whole"] = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_sinks: bool = False
    sliding_window: int | None = Field(default=None, gt=0)
    sliding_layers: tuple[int, ...] | None = None
    tie_embeddings: bool = False
    norm_eps: float = Field(default=1e-6, gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    init_std: float = Field(default=0.02, gt=0)
    init_from: str | None = None
    layer_shape_only: bool = False
    """The file gives the MoE layer of a published model whose other parts differ: no training, only shapes."""

    @model_validator(mode="after")
    def _fits(self) -> ModelConfig:
        kv = self.num_key_value_heads or self.num_attention_heads
        if self.num_attention_heads % kv:
            raise ValueError(
                f"model.num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"model.num_key_value_heads={kv}; choose a divisor"
            )
        if self.attention_head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} is not a multiple of model.num_attention_heads="
                f"{self.num_attention_heads}; change one or set model.attention_head_dim"
            )
        width = self.attention_head_dim or self.hidden_size // self.num_attention_heads
        if width % 2:
            raise ValueError(
                f"a head of attention is {width} wide, but positions turn pairs of channels; make "
                "model.attention_head_dim (or model.hidden_size / model.num_attention_heads) even"
            )
        return self


class LeastLoadedConfig(Section):
    """LLEP: a rank's share is ceil(alpha x rows / ranks); below the imbalance threshold (lambda) nothing spills."""

    alpha: Rational = Fraction(1)
    imbalance_threshold: Rational | None = Fraction(13, 10)
    min_rows: int = Field(default=1024, gt=0)
    min_rows_far: int | None = Field(default=None, gt=0)
    small_remainder: Literal["prose", "pseudocode"] = "prose"
    spill_order: Literal["global", "source_first"] = "global"
    max_borrowed: int | None = Field(default=None, ge=0)


class RelayoutConfig(Section):
    """LAER: a layout from the counts of the last `window` calls, used `lag` calls later."""

    window: int = Field(default=5, gt=0)
    lag: int = Field(default=1, gt=0)
    hysteresis: Rational = Fraction(2, 100)
    skip_below: Rational = Fraction(105, 100)
    rotate: bool = True


class SwapConfig(Section):
    """HierMoE's expert swap: a pair per layer every `every` steps, if modelled time falls by min_gain and `horizon`
    steps of it pay for the move. seconds_per_row: compute, which the published objective leaves out (0)."""

    every: int = Field(default=1, gt=0)
    objective: Literal["hierarchical", "load"] = "hierarchical"
    smooth_exponent: int | None = Field(default=10, gt=0)
    seconds_per_row: float = Field(default=0.0, ge=0)
    min_gain: float = Field(default=1e-3, ge=0)
    horizon: int = Field(default=100, gt=0)


class ParallelConfig(Section):
    """How the layer runs: never changes its function. `scheme` names a combination (configs/schemes/).

    head_chunks: 2 computes the heads of a micro-batch in halves, one's exchange while the other is computed.
    max_rows_per_rank: no rank holds more rows of experts at once; a plan over it runs in rounds, or over_budget=error.
    overlap_chunks: rounds of a plan within the budget; exchanges of one run under the compute of another.
    prefetch_layers: 1 sends sharded experts of the next layer on their way under the experts of this one.
    """

    scheme: str = "ep"
    expert_parallel_size: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    tensor_parallel_size: int = Field(default=1, gt=0)
    head_parallel_size: int = Field(default=1, gt=0)
    head_chunks: Literal[1, 2] = 1
    planner: Literal["static", "least_loaded", "relayout"] = "static"
    placement: Literal["fixed", "swap"] = "fixed"
    transport: Literal["flat", "groupwise", "hierarchical_dedup"] = "flat"
    deduplicate: bool = True
    hierarchy_depth: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    residency: Literal["owned", "borrowed", "fully_sharded"] = "owned"
    data_sharding: Literal["none", "full"] = "none"
    data_assignment: Literal["round_robin", "by_domain", "by_affinity"] = "round_robin"
    max_rows_per_rank: int | None = Field(default=None, gt=0)
    over_budget: Literal["chunk", "error"] = "chunk"
    overlap_chunks: int = Field(default=1, gt=0)
    prefetch_layers: Literal[0, 1] = 0
    slots_per_rank: int | None = Field(default=None, gt=0)
    least_loaded: LeastLoadedConfig = LeastLoadedConfig()
    relayout: RelayoutConfig = RelayoutConfig()
    swap: SwapConfig = SwapConfig()


class CollectiveConfig(Section):
    """What another collective than all_to_all takes at a level, n being the bytes that a rank hands in."""

    name: Literal["all_gather", "all_reduce"]
    alpha: float | None = Field(default=None, ge=0)
    beta: float | None = Field(default=None, ge=0)
    rail_alpha: float | None = Field(default=None, ge=0)
    rail_beta: float | None = Field(default=None, ge=0)


class LevelConfig(Section):
    """One level of a cluster: `size` ranks share one unit of it.

    An all-to-all of n bytes per rank takes alpha + n beta seconds among all ranks of a unit, and rail_alpha +
    n rail_beta (null: the same) among one rank of each smaller unit inside. shared_link: the ranks of a smaller unit
    reach the others over one link of the unit's, not over links of their own.
    """

    name: str
    size: int | None = Field(default=None, gt=0)
    alpha: float = Field(default=0.0, ge=0)
    beta: float = Field(default=0.0, ge=0)
    rail_alpha: float | None = Field(default=None, ge=0)
    rail_beta: float | None = Field(default=None, ge=0)
    shared_link: bool = False
    collectives: tuple[CollectiveConfig, ...] = ()


class ClusterConfig(Section):
    """Where ranks sit: levels from the innermost to the outermost, whose size null means all ranks.

    device_teraflops: of experts' products, as `bench layer` reports them for one device.
    """

    name: str = "one_host"
    levels: tuple[LevelConfig, ...] = Field(default=(LevelConfig(name="host"),), min_length=1)
    device_memory_bytes: int | None = Field(default=None, gt=0)
    device_teraflops: float | None = Field(default=None, gt=0)


class CommunicationConfig(Section):
    """What a device's collectives are told when workers start; a variable that is set already wins.

    connect_timeout_s: a peer's first collective, after data and checkpoints were loaded; execute_timeout_s: inside a
    running one; buffer_mb: per direction and communicator; network_interface: the host's, where it has several.
    Hosts and NVIDIA GPUs take the interface only: there `train.timeout_s` bounds every collective.
    """

    connect_timeout_s: int = Field(default=1200, ge=120, le=7200)
    execute_timeout_s: int = Field(default=1800, gt=0)
    buffer_mb: int = Field(default=200, gt=0)
    deterministic: bool = True
    network_interface: str | None = None

    @model_validator(mode="after")
    def _first_error_is_the_true_one(self) -> CommunicationConfig:
        if self.execute_timeout_s <= self.connect_timeout_s:
            raise ValueError(
                f"communication.execute_timeout_s={self.execute_timeout_s} must exceed communication.connect_timeout_s="
                f"{self.connect_timeout_s}, or a late rank is reported as a hung collective"
            )
        return self


class TrainConfig(Section):
    """The loop.

    plain_ops: no fused experts and weighted sums, for devices that lack a kernel; synchronous: wait for the device
    after every layer, so that an error appears where it is caused. Both are slow. trace_every: steps between those
    whose choices are recorded (0: none).
    """

    steps: int = Field(default=100, gt=0)
    seed: int = 0
    dtype: Literal["float64", "float32", "bfloat16"] = "float32"
    global_batch_size: int = Field(default=16, gt=0)
    micro_batch_size: int | None = Field(default=None, gt=0)
    sequence_length: int = Field(default=256, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    min_learning_rate: float = Field(default=1e-4, ge=0)
    warmup_steps: int = Field(default=10, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, gt=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    recompute: Literal["none", "experts", "layer"] = "none"
    validate_every: int = Field(default=0, ge=0)
    validation_batches: int = Field(default=4, gt=0)
    save_every: int = Field(default=0, ge=0)
    keep_last: int = Field(default=2, gt=0)
    save_async: bool = False
    on_nan: Literal["stop", "skip"] = "stop"
    explode_factor: float | None = Field(default=None, gt=1)
    health_every: int = Field(default=50, ge=0)
    trace_every: int = Field(default=0, ge=0)
    log_every: int = Field(default=1, gt=0)
    trackers: tuple[str, ...] = ("tensorboard",)
    timeout_s: float = Field(default=120.0, gt=0)
    plain_ops: bool = False
    synchronous: bool = False


class DataConfig(Section):
    """Where tokens come from."""

    source: Literal["stdlib", "text", "memmap", "megatron", "hf"] = "stdlib"
    paths: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    dataset: str | None = None
    dataset_split: str = "train"
    text_field: str = "text"
    validation_fraction: float = Field(default=0.02, gt=0, lt=1)
    document_masks: bool = True
    domain_mix: Literal["even", "proportional"] = "even"
    seed: int = 0


class Config(Section):
    """One experiment."""

    name: str = "experiment"
    backend: str | None = None
    cluster: ClusterConfig = ClusterConfig()
    model: ModelConfig = ModelConfig()
    moe: MoeConfig = MoeConfig()
    parallel: ParallelConfig = ParallelConfig()
    communication: CommunicationConfig = CommunicationConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if name in ("", ".", "..") or set(name) & set("/\\") or not name.isprintable() or len(name) > 100:
            raise ValueError(f"name={name!r} can't be part of a folder's name; use letters, digits, - and _")
        return name
