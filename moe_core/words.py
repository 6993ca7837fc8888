"""Words of the field: paper term -> our field -> what Megatron, MindFormers and Hugging Face call it.

An unknown key in a config file is looked up here first; docs/words.md is this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """One concept. megatron covers MindSpeed and Galvatron; others: torchtitan, DeepSpeed, nanotron."""

    field: str
    meaning: str
    megatron: tuple[str, ...] = ()
    mindformers: tuple[str, ...] = ()
    hugging_face: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def aliases(self) -> tuple[str, ...]:
        return self.megatron + self.mindformers + self.hugging_face + self.others


WORDS: tuple[Word, ...] = (
    Word(
        "moe.num_experts",
        "experts per layer, E",
        ("num_moe_experts",),
        ("expert_num",),
        ("num_local_experts", "n_routed_experts"),
    ),
    Word(
        "moe.top_k",
        "experts that a token chooses, K",
        ("moe_router_topk",),
        ("num_experts_chosen",),
        ("num_experts_per_tok", "num_experts_per_token", "moe_k"),
        ("k", "topk"),
    ),
    Word(
        "moe.expert_hidden_size",
        "width inside an expert, F",
        ("moe_ffn_hidden_size",),
        ("moe_intermediate_size",),
        ("moe_intermediate_size", "expert_intermediate_size"),
        ("moe_inter_dim",),
    ),
    Word("moe.activation", "expert's non-linearity", ("swiglu",), (), ("hidden_act", "hidden_activation")),
    Word("moe.swiglu_limit", "bound of the clamped gate", ("activation_func_clamp_value",), (), ("swiglu_limit",)),
    Word("moe.expert_bias", "experts have biases"),
    Word("moe.router_bias", "the gate has a bias, learned by gradient"),
    Word("moe.router", "how a token finds its experts (gate)", ("moe_router_type",), ("routing_policy",), ()),
    Word(
        "moe.score_function",
        "scores from logits: softmax or sigmoid",
        ("moe_router_score_function",),
        ("use_gating_sigmoid",),
        ("scoring_func",),
        ("score_func",),
    ),
    Word("moe.softmax_order", "softmax before or after choosing", ("moe_router_pre_softmax",), (), ()),
    Word(
        "moe.norm_topk_prob", "chosen weights sum to one", (), ("norm_topk_prob",), ("norm_topk_prob",), ("route_norm",)
    ),
    Word(
        "moe.route_scale",
        "factor on the routing weights",
        ("moe_router_topk_scaling_factor",),
        ("routed_scaling_factor",),
        ("routed_scaling_factor",),
    ),
    Word("moe.router_dtype", "precision of logits and scores", ("moe_router_dtype",), ("router_dense_type",), ()),
    Word(
        "moe.num_groups",
        "expert groups of group-limited routing",
        ("moe_router_num_groups",),
        ("n_group",),
        ("n_group", "n_groups"),
        ("num_expert_groups",),
    ),
    Word(
        "moe.group_top_k",
        "groups that a token may use",
        ("moe_router_group_topk",),
        ("topk_group",),
        ("topk_group",),
        ("num_limited_groups",),
    ),
    Word(
        "moe.bias_update_rate",
        "step of the balancing bias (loss-free balancing)",
        ("moe_router_bias_update_rate",),
        ("topk_bias_update_rate",),
        ("e_score_correction_bias",),
        ("load_balance_coeff",),
    ),
    Word(
        "moe.aux_loss_coeff",
        "weight of the load-balance loss",
        ("moe_aux_loss_coeff",),
        ("aux_loss_factor", "aux_loss_factors"),
        ("router_aux_loss_coef", "aux_loss_alpha"),
        ("l_aux",),
    ),
    Word(
        "moe.aux_loss_scope",
        "over what the balance loss pools",
        ("moe_router_load_balancing_type",),
        (),
        ("seq_aux",),
        ("aux_loss_type",),
    ),
    Word(
        "moe.z_loss_coeff",
        "weight of the router's z loss",
        ("moe_z_loss_coeff",),
        ("z_loss_factor",),
        ("router_z_loss_coef",),
    ),
    Word("moe.locality_loss_coeff", "weight of LocMoE's locality loss, mu"),
    Word(
        "moe.capacity_factor",
        "rows per expert over the even share; null = dropless",
        ("moe_expert_capacity_factor",),
        ("capacity_factor",),
        ("expert_capacity",),
        ("eval_capacity_factor", "min_capacity"),
    ),
    Word(
        "moe.drop_policy",
        "which tokens are dropped past capacity",
        ("moe_token_drop_policy",),
        ("enable_sdrop",),
    ),
    Word(
        "moe.num_shared_experts",
        "experts that see every token",
        (),
        ("shared_expert_num", "enable_shared_expert"),
        ("n_shared_experts",),
        ("shared_experts", "use_residual"),
    ),
    Word(
        "moe.shared_expert_hidden_size",
        "width of the shared experts together",
        ("moe_shared_expert_intermediate_size",),
        (),
        ("shared_expert_intermediate_size",),
    ),
    Word("moe.shared_expert_gate", "a sigmoid gate on the shared experts", ("moe_shared_expert_gate",), (), ()),
    Word("moe.num_heads", "sub-tokens of Multi-Head LatentMoE, N_h"),
    Word("moe.head_dim", "width of a sub-token, d_h"),
    Word("model.vocab_size", "rows of the embedding", ("padded_vocab_size",), (), ("n_vocab",)),
    Word("model.hidden_size", "width of a token, D", (), (), ("d_model", "n_embd"), ("dim",)),
    Word(
        "model.num_layers",
        "decoder layers",
        (),
        (),
        ("num_hidden_layers", "n_layer"),
        ("n_layers",),
    ),
    Word("model.num_attention_heads", "query heads", (), ("num_heads",), ("n_head",), ("n_heads",)),
    Word(
        "model.num_key_value_heads",
        "key and value heads of grouped queries",
        ("num_query_groups", "group_query_attention"),
        ("n_kv_heads",),
        ("num_key_value_heads",),
        ("n_kv_heads",),
    ),
    Word("model.attention_head_dim", "width of an attention head", ("kv_channels",), (), ("attention_head_size",)),
    Word(
        "model.num_dense_layers",
        "first layers without experts",
        ("moe_layer_freq",),
        ("first_k_dense_replace",),
        ("first_k_dense_replace",),
        ("n_dense_layers",),
    ),
    Word(
        "model.dense_hidden_size",
        "feed-forward width of dense layers",
        ("ffn_hidden_size",),
        ("intermediate_size",),
        ("intermediate_size",),
        ("inter_dim",),
    ),
    Word("model.qk_norm", "normalise queries and keys", ("qk_layernorm",), (), ("use_qk_norm",)),
    Word("model.attention_bias", "biases in attention", ("add_qkv_bias",), ("qkv_has_bias",), ("attention_bias",)),
    Word("model.attention_output_bias", "a bias on attention's output", ("add_bias_linear",)),
    Word("model.attention_sinks", "a learned logit per head in the softmax", ("softmax_type",)),
    Word("model.sliding_window", "how far back a token sees", ("window_size",), (), ("sliding_window",)),
    Word("model.sliding_layers", "layers that have the window", ("window_attn_skip_freq",), (), ("layer_types",)),
    Word("model.rope_scaling", "YaRN", ("rope_type", "yarn_rotary_scaling_factor"), (), ("rope_parameters",)),
    Word("model.init_from", "checkpoint to start from", ("load", "pretrained_checkpoint"), ("load_checkpoint",)),
    Word(
        "model.tie_embeddings",
        "output layer shares the embedding",
        ("untie_embeddings_and_output_weights",),
        ("tie_word_embeddings",),
        ("tie_word_embeddings",),
    ),
    Word("model.norm_eps", "epsilon of the norms", ("norm_epsilon", "layernorm_epsilon"), (), ("rms_norm_eps",)),
    Word("model.rope_theta", "base of the rotary embedding", ("rotary_base",), ("theta",), ("rope_theta",)),
    Word("model.init_std", "spread of initial weights", ("init_method_std",), (), ("initializer_range",)),
    Word(
        "parallel.expert_parallel_size",
        "ranks that share one set of experts",
        ("expert_model_parallel_size", "global_ep_deg"),
        ("expert_parallel",),
        ("ep_size",),
        ("expert_parallel_degree", "autoep_size"),
    ),
    Word(
        "parallel.tensor_parallel_size",
        "ranks that share one matrix",
        ("tensor_model_parallel_size", "global_tp_deg"),
        ("model_parallel",),
        ("tp_size",),
        ("tensor_parallel_degree",),
    ),
    Word("parallel.head_parallel_size", "ranks that share the heads of Multi-Head LatentMoE"),
    Word(
        "parallel.transport",
        "how rows travel to experts and back",
        ("moe_token_dispatcher_type",),
        ("use_allgather_dispatcher",),
        (),
        ("token_dispatcher_type", "dispatcher"),
    ),
    Word("parallel.planner", "who computes which rows (LLEP, LAER)", (), ("enable_expert_relocation",), ()),
    Word("parallel.placement", "whether owned experts move (HierMoE swap)"),
    Word("parallel.residency", "where expert weights rest (FSEP)"),
    Word("parallel.data_sharding", "dense parameters replicated or sharded", ("data_parallel_sharding_strategy",)),
    Word("parallel.max_rows_per_rank", "bound on rows that a rank holds at once in a layer"),
    Word("parallel.over_budget", "rounds or an error for a plan over that bound"),
    Word("parallel.overlap_chunks", "rounds whose exchanges run under expert compute"),
    Word("parallel.prefetch_layers", "sharded experts set out under the layer before"),
    Word("train.steps", "optimizer steps", ("train_iters",), ("sink_size",), ("max_steps",), ("num_steps",)),
    Word(
        "train.global_batch_size",
        "sequences in one optimizer step, over all ranks",
        (),
        ("batch_size",),
        (),
        ("train_batch_size",),
    ),
    Word(
        "train.micro_batch_size",
        "sequences that a rank runs at once",
        (),
        ("micro_batch_num",),
        ("per_device_train_batch_size",),
        ("train_micro_batch_size_per_gpu", "local_batch_size"),
    ),
    Word(
        "train.sequence_length", "tokens in a sequence", ("seq_length",), ("seq_length",), (), ("seq_len", "block_size")
    ),
    Word("train.learning_rate", "peak learning rate", ("lr",), (), ()),
    Word("train.min_learning_rate", "learning rate at the end", ("min_lr",), ("end_learning_rate",), ("min_lr",)),
    Word("train.warmup_steps", "steps of rising learning rate", ("lr_warmup_iters",), (), ("num_warmup_steps",)),
    Word(
        "train.max_grad_norm",
        "bound of the gradient's norm",
        ("clip_grad",),
        ("max_grad_norm",),
        ("gradient_clipping",),
    ),
    Word("train.adam_beta1", "AdamW's first decay", (), ("beta1",), ("adam_beta1",)),
    Word("train.adam_beta2", "AdamW's second decay", (), ("beta2",), ("adam_beta2",)),
    Word("train.adam_eps", "AdamW's epsilon", (), ("eps",), ("adam_epsilon",)),
    Word(
        "train.recompute",
        "what backward computes again",
        ("recompute_granularity",),
        ("use_recompute",),
        ("gradient_checkpointing",),
    ),
    Word("train.dtype", "precision of the computation", ("params_dtype", "bf16"), ("compute_dtype",), ("torch_dtype",)),
    Word(
        "train.save_every", "steps between checkpoints", ("save_interval",), ("save_checkpoint_steps",), ("save_steps",)
    ),
    Word("train.keep_last", "checkpoints kept", (), ("keep_checkpoint_max",), ("save_total_limit",)),
    Word(
        "train.validate_every",
        "steps between validations",
        ("eval_interval",),
        ("eval_step_interval",),
        ("eval_steps",),
    ),
    Word("train.log_every", "steps between lines", ("log_interval",), ("per_print_times",), ("logging_steps",)),
    Word("train.trackers", "where figures are shown: TensorBoard, wandb, others", (), (), ("report_to",)),
    Word(
        "train.timeout_s", "seconds a rank waits for the others", ("distributed_timeout_minutes",), (), ("ddp_timeout",)
    ),
    Word(
        "data.tokenizer",
        "bytes, or a tokenizers JSON file",
        ("tokenizer_model", "tokenizer_type"),
        (),
        ("tokenizer_name",),
    ),
    Word("data.paths", "files of the data set", ("data_path",), ("dataset_dir",), ("data_files",)),
)

NOT_OFFERED: Mapping[str, str] = {
    "pipeline_parallel_size": "pipeline parallelism",
    "pipeline_model_parallel_size": "pipeline parallelism",
    "pipeline_parallel_degree": "pipeline parallelism",
    "pipeline_stage": "pipeline parallelism",
    "context_parallel_size": "context parallelism",
    "context_parallel_degree": "context parallelism",
    "fp8": "FP8",
    "fp8_format": "FP8",
    "q_lora_rank": "MLA attention",
    "kv_lora_rank": "MLA attention",
    "qk_rope_head_dim": "MLA attention",
    "multi_latent_attention": "MLA attention",
    "graph_mode": "MindSpore GRAPH_MODE",
}
"""Keys of things that 1.0 refuses by name."""


def alias_table() -> dict[str, str]:
    """Foreign name -> our field; a name of several systems keeps its first meaning."""
    table: dict[str, str] = {}
    for word in WORDS:
        for alias in word.aliases:
            table.setdefault(alias, word.field)
    return table


def as_markdown() -> str:
    """docs/words.md: one line per concept."""
    lines = [
        "# Words",
        "",
        "Which of our fields means what, and what other systems call it. An unknown key in a config file is looked",
        "up here, so a name of another system is answered with ours. Same word, other meaning: `load_balance_coeff`",
        "is the step of the balancing bias in torchtitan, not a loss weight; `moe_layer_freq` also describes patterns",
        "that we do not offer. This page is made from `moe_core/words.py`.",
        "",
        "| field | meaning | Megatron, MindSpeed, Galvatron | MindFormers | Hugging Face | torchtitan and others |",
        "|---|---|---|---|---|---|",
    ]
    for word in WORDS:
        names = (word.megatron, word.mindformers, word.hugging_face, word.others)
        cells = [", ".join(f"`{n}`" for n in group) or "-" for group in names]
        lines.append(f"| `{word.field}` | {word.meaning} | {' | '.join(cells)} |")
    lines += ["", "Refused by name:", ""]
    lines += [f"- `{key}`: {what}" for key, what in NOT_OFFERED.items()]
    return "\n".join(lines) + "\n"
