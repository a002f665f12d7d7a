"""Which checkpoints of other kinds of states DeepSpeed makes, and where they go; without importing DeepSpeed."""

from zero_tables import BF16, BF16_OPTIMIZER, CPU, zero

OFFLOAD, SUB_GROUPS = zero(offload_optimizer=CPU), zero(sub_group_size=60)

SOURCES = {
    **{f"lora_{stage}": ("lora", 2, stage, {}) for stage in range(4)},
    "lora_3_bf16": ("lora", 3, 3, BF16),
    "lora_3_excluded": ("lora", 3, 3, {}),
    "lora_2_excluded": ("lora", 2, 2, {}),
    "frozen_group_0": ("frozen_group", 1, 0, {}),
    "frozen_group_3": ("frozen_group", 2, 3, {}),
    "mixed_2": ("mixed", 3, 2, {}),
    **{f"muon_{stage}_of_{world}": ("muon", world, stage, {}) for stage in (1, 2, 3) for world in (1, 2, 3)},
    "muon_0": ("muon", 2, 0, {}),
    "muon_torch_0_bf16": ("muon_torch", 2, 0, BF16),
    "muon_torch_2_offload": ("muon_torch", 3, 2, OFFLOAD),
    "muon_torch_3_bf16": ("muon_torch", 3, 3, BF16),
    "muon_2_bf16": ("muon", 2, 2, BF16),
    "muon_1_bf16_optimizer": ("muon", 3, 1, BF16_OPTIMIZER),
    **{f"{kind}_{stage}": (kind, 2, stage, {}) for kind in ("adafactor", "lamb") for stage in (0, 2, 3)},
    "adafactor_2_alone": ("adafactor", 1, 2, {}),
}
"""Name → kind, ranks, stage, configuration."""

LOADS = {
    "lora_0_to_3": ("lora_0", 3, 3, {}),
    "lora_1_to_3": ("lora_1", 1, 3, {}),
    "lora_2_to_3": ("lora_2", 3, 3, {}),
    "lora_3_to_2": ("lora_3", 1, 2, {}),
    "lora_3_to_1": ("lora_3", 3, 1, {}),
    "lora_3_to_0": ("lora_3", 1, 0, {}),
    "lora_3_bf16_to_2": ("lora_3_bf16", 2, 2, BF16),
    "lora_3_bf16_to_bf16_optimizer": ("lora_3_bf16", 2, 1, BF16_OPTIMIZER),
    "lora_3_excluded_to_2": ("lora_3_excluded", 2, 2, {}),
    "lora_2_excluded_to_3": ("lora_2_excluded", 3, 3, {}),
    "frozen_group_3_to_3": ("frozen_group_3", 3, 3, {}),
    "frozen_group_0_to_3": ("frozen_group_0", 2, 3, {}),
    "mixed_2_to_3": ("mixed_2", 2, 3, {}),
    "mixed_2_to_1": ("mixed_2", 1, 1, {}),
    "muon_1_to_3": ("muon_1_of_1", 3, 3, {}),
    "muon_1_of_2_to_3": ("muon_1_of_2", 3, 1, {}),
    "muon_1_of_3_to_2": ("muon_1_of_3", 2, 2, {}),
    "muon_2_of_2_to_1": ("muon_2_of_2", 1, 2, {}),
    "muon_2_of_3_to_0": ("muon_2_of_3", 1, 0, {}),
    "muon_2_of_3_again": ("muon_2_of_3", 3, 2, {}),
    "muon_2_to_sub_groups": ("muon_2_of_1", 2, 3, SUB_GROUPS),
    "muon_3_of_1_to_2": ("muon_3_of_1", 2, 2, {}),
    "muon_3_of_2_to_1": ("muon_3_of_2", 3, 1, {}),
    "muon_3_of_3_to_3": ("muon_3_of_3", 2, 3, {}),
    "muon_0_to_2": ("muon_0", 3, 2, {}),
    "muon_torch_0_bf16_to_3": ("muon_torch_0_bf16", 3, 3, BF16),
    "muon_torch_2_offload_to_other_ranks": ("muon_torch_2_offload", 2, 2, OFFLOAD),
    "muon_torch_2_offload_to_whole": ("muon_torch_2_offload", 2, 2, {}),
    "muon_2_to_offload": ("muon_2_of_3", 2, 1, OFFLOAD),
    "muon_torch_3_bf16_to_2": ("muon_torch_3_bf16", 2, 2, BF16),
    "muon_2_bf16_to_3": ("muon_2_bf16", 3, 3, BF16),
    "muon_1_bf16_optimizer_to_2": ("muon_1_bf16_optimizer", 2, 2, BF16),
    "muon_1_bf16_optimizer_to_itself": ("muon_1_bf16_optimizer", 2, 1, BF16_OPTIMIZER),
    "muon_2_bf16_to_bf16_optimizer": ("muon_2_bf16", 3, 1, BF16_OPTIMIZER),
    "adafactor_2_as_it_was": ("adafactor_2", 2, 1, {}),
    "adafactor_3_as_it_was": ("adafactor_3", 2, 3, {}),
    "lamb_2_as_it_was": ("lamb_2", 2, 2, {}),
    "lamb_3_as_it_was": ("lamb_3", 2, 3, {}),
    "adafactor_0": ("adafactor_0", 1, 0, {}),
}
"""Source; ranks, stage and configuration of the engine that loads what is written for it."""

THROUGH = {
    "lora_3": ("dcp", "canonical", "consolidated"),
    "lora_2": ("dcp",),
    "muon_1_of_3": ("dcp", "canonical", "consolidated"),
    "muon_3_of_2": ("consolidated",),
    "lamb_3": ("canonical",),
}
"""Source → formats on the way: into `zero2` and `zero3` of the same number of ranks."""

REFUSED = {
    "adafactor_2": ("zero3", 2),
    "adafactor_3": ("zero3", 3),
    "adafactor_2_alone": ("zero2", 2),
    "lamb_2": ("zero2", 3),
    "lamb_3": ("dcp", 2),
}
"""Source → format and ranks that cannot hold what is of one rank's."""

ALL = [
    *(f"make_{name}" for name in SOURCES),
    *(f"load_{name}" for name in LOADS),
    *(f"restore_{name}" for name in LOADS),
    *(f"through_{to}_{name}" for name, formats in THROUGH.items() for to in formats),
    "restore_refuses_other_parts",
    "restore_refuses_missing_bases",
    "buffers_of_a_file_that_does_not_tell",
    "universal_of_lora",
    "universal_of_muon",
    "muon_under_init",
]

"""Every case; `tests/run.sh --all` runs those that are not below."""
QUICK = [
    *(f"make_{n}" for n in ("lora_2", "lora_3", "lora_3_excluded", "frozen_group_3", "muon_1_of_1", "muon_2_of_3")),
    *(
        f"make_{n}"
        for n in ("muon_3_of_2", "muon_0", "muon_torch_2_offload", "muon_1_bf16_optimizer", "adafactor_2", "lamb_3")
    ),
    *(f"load_{n}" for n in ("lora_2_to_3", "lora_3_to_1", "lora_3_excluded_to_2", "frozen_group_3_to_3")),
    *(f"load_{n}" for n in ("muon_1_to_3", "muon_2_of_3_again", "muon_2_of_3_to_0", "muon_3_of_2_to_1", "muon_0_to_2")),
    *(f"load_{n}" for n in ("muon_torch_2_offload_to_whole", "muon_1_bf16_optimizer_to_2")),
    *(f"load_{n}" for n in ("adafactor_2_as_it_was", "lamb_3_as_it_was")),
    *(
        f"restore_{n}"
        for n in ("lora_2_to_3", "lora_3_excluded_to_2", "muon_3_of_2_to_1", "muon_torch_2_offload_to_whole")
    ),
    "restore_lamb_3_as_it_was",
    "through_dcp_lora_3",
    "restore_refuses_other_parts",
    "restore_refuses_missing_bases",
    "buffers_of_a_file_that_does_not_tell",
    "universal_of_muon",
    "muon_under_init",
]
