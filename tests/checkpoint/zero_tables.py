"""Which DeepSpeed checkpoints are made, and into which engines they go; without importing DeepSpeed."""

BF16 = {"bf16": {"enabled": True}}
BF16_OPTIMIZER = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
CPU = {"device": "cpu"}


def zero(**options):
    """A configuration with these in `zero_optimization`."""
    return {"zero_optimization": options}


SUB_GROUPS, OFFLOAD = zero(sub_group_size=500), zero(offload_optimizer=CPU)
ROUND_ROBIN, ALIGNED = zero(round_robin_gradients=True), zero(parameter_alignment=True)

SOURCES = {
    "stage0_anon": ("anon", 0, {}),
    "stage0_bf16_adamw": ("adamw", 0, BF16),
    "stage1_adamw": ("adamw", 1, {}),
    "stage1_bf16_optimizer_anon": ("anon", 1, BF16_OPTIMIZER),
    "stage2_anon": ("anon", 2, {}),
    "stage2_lion": ("lion", 2, {}),
    "stage2_bf16_adamw": ("adamw", 2, BF16),
    "stage2_offload_anon": ("anon", 2, OFFLOAD),
    "stage2_round_robin_adamw": ("adamw", 2, ROUND_ROBIN),
    "stage2_aligned_anon": ("anon", 2, ALIGNED),
    "stage2_elastic_adamw": ("adamw", 2, zero(elastic_checkpoint=True)),
    "stage3_anon": ("anon", 3, {}),
    "stage3_bf16_adamw": ("adamw", 3, BF16),
    "stage3_sub_groups_anon": ("anon", 3, SUB_GROUPS),
    "stage3_offload_lion": ("lion", 3, zero(sub_group_size=500, offload_optimizer=CPU)),
}
"""Name → optimizer, stage, configuration."""

LOADS = {
    "2_to_3": ("stage2_anon", 3, {}),
    "2_to_3_sub_groups": ("stage2_anon", 3, SUB_GROUPS),
    "3_to_2": ("stage3_sub_groups_anon", 2, {}),
    "3_to_other_sub_groups": ("stage3_sub_groups_anon", 3, zero(sub_group_size=100)),
    "0_to_2": ("stage0_anon", 2, {}),
    "2_to_0": ("stage2_anon", 0, {}),
    "lion_2_to_3_offload": ("stage2_lion", 3, OFFLOAD),
    "lion_3_offload_to_2": ("stage3_offload_lion", 2, {}),
    "bf16_2_to_3": ("stage2_bf16_adamw", 3, BF16),
    "bf16_3_to_0": ("stage3_bf16_adamw", 0, BF16),
    "bf16_3_to_bf16_optimizer": ("stage3_bf16_adamw", 1, BF16_OPTIMIZER),
    "bf16_optimizer_to_2": ("stage1_bf16_optimizer_anon", 2, BF16),
    "bf16_0_to_bf16_optimizer": ("stage0_bf16_adamw", 1, BF16_OPTIMIZER),
    "round_robin_to_1": ("stage2_round_robin_adamw", 1, zero(round_robin_gradients=False)),
    "1_to_round_robin": ("stage1_adamw", 2, ROUND_ROBIN),
    "aligned_to_2": ("stage2_aligned_anon", 2, {}),
    "2_to_aligned": ("stage2_anon", 2, ALIGNED),
}
"""Source, and the stage and configuration of the engine that loads what is written of it."""

RESTORES = {
    **{name: LOADS[name] for name in ("2_to_3_sub_groups", "3_to_2", "2_to_0", "1_to_round_robin", "2_to_aligned")},
    **{name: LOADS[name] for name in ("bf16_3_to_0", "bf16_3_to_bf16_optimizer", "lion_3_offload_to_2")},
    "2_to_3_parameters_offloaded": ("stage2_anon", 3, zero(offload_optimizer=CPU, offload_param=CPU)),
    "3_to_3_no_persistent_parameters": ("stage3_anon", 3, zero(stage3_param_persistence_threshold=0)),
    "elastic_to_3": ("stage2_elastic_adamw", 3, {}),
}

UNIVERSAL = {
    "2_to_1": ("stage2_anon", 1, {}),
    "3_to_2": ("stage3_anon", 2, {}),
    "bf16_3_to_2": ("stage3_bf16_adamw", 2, BF16),
    "2_to_3": ("stage1_adamw", 3, {}),
}
CASES = [
    *(f"make_{name}" for name in SOURCES),
    *(f"load_{name}" for name in LOADS),
    *(f"restore_{name}" for name in RESTORES),
    *(f"universal_{name}" for name in UNIVERSAL),
    "load_one_rank_on_two",
    "restore_from_dcp",
    "restore_from_canonical",
    "restore_refuses_other_groups",
    "universal_of_deepspeed_stage2",
    "universal_of_deepspeed_stage3",
    "universal_of_deepspeed_of_what_is_written",
    "zero_to_fp32_of_what_is_written",
]
