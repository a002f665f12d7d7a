"""The fields of a training configuration: each with what it means, its type and its range, which `config.check` checks."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Annotated, Literal

from anon_dist.train.config.ranges import (
    Below1,
    Epsilon,
    Gamma,
    Instead,
    Layers,
    LearningRate,
    Minutes,
    NotNegative,
    Place,
    Positive,
    PositiveShare,
    RefreshRatio,
    Seed,
    Share,
    Size,
    StateDtype,
    Steps,
    StepsOrZero,
    Text,
    Whole,
)

BY_NAME = ("lr_by_name", "weight_decay_by_name", "gamma_by_name")
"""Fields of `optim` with values for patterns of parameters' names."""


@dataclass
class ModelConfig:
    family: Literal["gpt2", "llama", "qwen3", "gemma3", "olmo2", "mixtral"] = "gpt2"
    """Architecture, built with transformers. qwen3 is Llama with norms of queries and keys, which keep large runs stable; gemma3 attends to
    a window in five of six layers; mixtral has experts. Others: see config."""
    layers: Layers = 12
    """Transformer blocks."""
    width: Size = 768
    """Size of the residual stream."""
    heads: Size = 12
    """Attention heads; they divide the width."""
    kv_heads: Size | None = None
    """Key and value heads of grouped-query attention; not GPT-2's. None: as many as heads."""
    head_dim: Size | None = None
    """Size of a head, for llama, qwen3, gemma3 and mixtral. None: width / heads."""
    hidden: Size | None = None
    """Size inside the feed-forward block. None: 4 · width (GPT-2), or 8/3 · width rounded up to 256 (the others)."""
    experts: Size | None = None
    """mixtral: feed-forward blocks of a layer. None: 8."""
    experts_per_token: Size | None = None
    """mixtral: how many of them a token passes. None: 2. Their load is balanced as in transformers (router_aux_loss_coef)."""
    window: Size | None = None
    """gemma3: tokens that the layers with a window attend to. None: 512."""
    context: Size = 1024
    """Longest sequence the model takes; data.seq_len must not exceed it."""
    tie_embeddings: bool = True
    """Whether the output matrix is the token embedding."""
    dropout: Below1 = 0.0
    """Dropout rate of GPT-2's embeddings, attention and residuals; pretraining over less than an epoch wants none."""
    rope_theta: Positive = 10000.0
    """Base of rotary position embeddings; not GPT-2's. May be raised at a resume, for a longer data.seq_len."""
    pad_vocab_to: Size = 64
    """The vocabulary is padded to a multiple of this, for the matrix units."""
    config: Place | None = None
    """A config.json of transformers, of any causal language model that it has, in place of all the above but pad_vocab_to; the vocabulary
    and its special tokens are those of the data."""
    from_pretrained: Place | None = None
    """Folder or hub name of a Hugging Face causal LM whose weights and shape to start from, instead of all the above."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention implementation of transformers. flex_attention is compiled, and neither for GPT-2 nor for CPUs; it and flash_attention_2
    keep documents apart in the kernel (data.mask_documents), sdpa by a call for each."""


@dataclass
class SourceConfig:
    """One of several prepared folders."""

    path: Place
    """Folder made by `anon-dist data prepare`, or its address."""
    weight: Positive = 1.0
    """Its share of the tokens, in proportion to the other weights."""
    max_epochs: Positive | None = None
    """How often its samples may come; a run that would read more is refused. None: as often as it comes to."""


@dataclass
class PhaseConfig:
    """What a run reads until a step. What it does not say is as in data and train."""

    until: Steps | None = None
    """Its last step. None: of the last phase, the run's."""
    sources: dict[Text, SourceConfig] = field(default_factory=dict)
    """As data.sources. A name means the same folder in every phase."""
    seq_len: Size | None = None
    """Tokens that a sample predicts."""
    global_batch: Size | None = None
    """Sequences per step. None: with another seq_len, so many that a step has as many tokens."""
    micro_batch: Size | None = None
    """Sequences that a rank takes at once. None: with another seq_len, so many that they have as many tokens, but at least one."""


@dataclass
class DataConfig:
    path: Place = "data/stdlib"
    """Folder made by `anon-dist data prepare`, or its address: s3://bucket/folder, gs://…, hf://… (any of fsspec)."""
    sources: dict[Text, SourceConfig] = field(default_factory=dict)
    """Name → path, weight and max_epochs of several such folders, of one tokenizer, read in place of path. On the command line as YAML:
    "{web: {path: data/web, weight: 0.7}, code: {path: data/code, weight: 0.3, max_epochs: 4}}"."""
    phases: tuple[PhaseConfig, ...] = ()
    """Phases one after the other, each with its sources, seq_len, global_batch and micro_batch until a step; on the command line as YAML:
    "[{until: 8000, sources: {web: {path: data/web}}}, {sources: {good: {path: data/good}}}]". Each source goes on where it was."""
    prepare: Text | None = None
    """The options, --out aside, with which `anon-dist data prepare` makes that folder; they are shown where it is missing."""
    seq_len: Size = 1024
    """Tokens that a sample predicts."""
    seed: Seed = 0
    """Order of the samples; a function of this and the sample's position alone."""
    mask_documents: bool = False
    """Whether attention stops at document borders (and positions count from them). Off: documents follow each other in one stream."""
    packing: Literal["concat", "best_fit"] = "concat"
    """What a sample holds. concat: the corpus one token after the other, documents cut where samples end; best_fit: whole documents, those
    longer than seq_len cut, packed so that little is left free (said at the start); places that are left predict nothing."""
    verify: Literal["size", "checksum"] = "checksum"
    """What of the shards is checked: their sizes, at the start; or their contents too, each 128 KiB when a rank first reads
    of it. What is copied from an address is compared as it comes in any case."""
    cache_dir: Place | None = None
    """Folder on a disk of each machine for copies of shards from addresses, shared by all runs. None: `data` in $ANON_DIST_CACHE, or
    else in ~/.cache/anon_dist."""
    cache_bytes: Whole | None = None
    """Bytes that it may hold (500B is 500 GB). A split that does not fit is read sample by sample. None: half of what its disk could
    give."""


@dataclass
class OptimConfig:
    name: Literal["anon", "adamw"] = "anon"
    """Anon, or torch's AdamW as a baseline. The fields marked (Anon) do nothing to AdamW."""
    lr: LearningRate = 6e-4
    """Peak learning rate. Its unit depends on γ: rescale it with gamma, or set match."""
    betas: tuple[Below1, Below1] = (0.9, 0.95)
    """Decay rates of the gradient's mean and of the squared gradient's."""
    embedding_beta1: Below1 | None = None
    """β1 of embeddings and of the output matrix. None: the first of betas, as of the others. With basis both, 0.9 beside 0.95."""
    eps: Epsilon | None = None
    """Added to the second moment. None: 1e-16 for Anon, 1e-8 for AdamW (where it stands outside the square root)."""
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay of matrices and embeddings; vectors are not decayed."""
    lr_by_name: dict[Text, LearningRate] = field(default_factory=dict)
    """Parameter name pattern (shell-style; the first that matches counts) → factor of the learning rate at every step. {"*wte*": 3}: token
    embeddings learn three times as fast."""
    weight_decay_by_name: dict[Text, NotNegative] = field(default_factory=dict)
    """Parameter name pattern → its own weight decay, in place of weight_decay and of the rule that vectors have none."""
    gamma: Gamma = 1.0
    """(Anon) Adaptivity γ: 0 is momentum SGD, 1 adapts like Adam."""
    gamma_by_name: dict[Text, Gamma] = field(default_factory=dict)
    """(Anon) Parameter name pattern (shell-style) → its own γ. lr, weight_decay and update_clip are those of all: see match."""
    gamma_schedule: dict[StepsOrZero, Gamma] = field(default_factory=dict)
    """(Anon) Step → γ, linear in between, in place of gamma; parameters that gamma_by_name names keep their own. It takes effect at
    refreshes. {0: 0.5, 2000: 1.0} rises over the first 2000 steps. Needs match."""
    match: Place | None = None
    """(Anon) lr, weight_decay and update_clip are meant for γ = 1, and multiplied in each param group for the γ in force there, so that its
    steps keep their root mean square (see anon_dist.optim.matching). A file of spectra, such as a sweep's calibration/spectrum.json, or
    the folder of a checkpoint of this model, of Anon or AdamW, to measure it on."""
    refresh_ratio: RefreshRatio = 1.03
    """(Anon) ρ: the preconditioner is refreshed at steps 1, …, a, ⌈ρ a⌉, … The paper's is 2."""
    beta3: Below1 = 0.93
    """(Anon) Weight of the old preconditioner at a refresh. The paper's is 0.5."""
    embedding_beta3: Below1 | None = None
    """(Anon) The same for embeddings and the output matrix, whose rows are silent in most steps. None: beta3. With basis both, 0.97."""
    update_clip: Positive | None = 1.0
    """(Anon) Largest magnitude of an element of v · m̂. Its unit depends on γ. None: unlimited, as in the paper."""
    window: Steps | Literal["auto"] | None = 64
    """(Anon) Steps before a refresh in which the second moment is accumulated; the others are faster. auto: so many that
    what is left out weighs at most 2^-24. None: all of them, as in the paper."""
    max_interval: Steps | None = None
    """(Anon) Most steps between two refreshes, however far apart refresh_ratio puts them. None: unlimited, as in the paper."""
    nesterov: bool = False
    """(Anon) Step along the mean that the same gradient would give once more, as Nesterov's momentum does."""
    cautious_decay: bool = False
    """(Anon) Decay a weight only where its update makes it smaller too."""
    basis: Literal["columns", "rows", "both"] | None = None
    """(Anon) Adapt matrices in the eigenbasis of their columns' covariance, of their rows', or of both, renewed at refreshes; never by the
    rows of embeddings and of the output matrix, which have columns under columns alone, and not experts, which are stacked. Under fsdp2,
    hsdp and deepspeed take columns: rows only where shards hold whole blocks. Of deepspeed only stages 0 and 3, where the ranks divide the
    rows of every matrix. Not for fsdp1, which cuts within rows. A run may be resumed with another one, or none, where the
    checkpoint's can be held."""
    basis_block: Size = 128
    """(Anon) Bases are block-diagonal, in blocks of so many columns or rows: 8 bytes of state for each, times the length of the side."""
    hold_silent: bool = False
    """(Anon) Elements without gradient since the last refresh keep their preconditioner; meant for γ < 0."""
    state_dtype: StateDtype = "float32"
    """(Anon) dtype of exp_avg, exp_avg_sq and precond: float32, float64 or bfloat16, or by state, float32 where nothing is said:
    "exp_avg=int8, exp_avg_sq=bfloat16, precond=bfloat16" (5 bytes per parameter)."""


@dataclass
class ScheduleConfig:
    warmup_steps: StepsOrZero = 100
    """Steps over which the learning rate rises linearly to its peak."""
    decay: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after the warm-up; wsd stays at the peak and falls linearly at the end."""
    decay_fraction: PositiveShare = 0.2
    """Share of all steps in which wsd falls."""
    min_ratio: Share = 0.1
    """Last learning rate, as a share of the peak."""


@dataclass
class TrainConfig:
    steps: Steps = 1000
    """Optimizer steps."""
    global_batch: Size = 64
    """Sequences per step, over all ranks: micro_batch · ranks · accumulation, the last of which follows."""
    tokens: Whole | None = None
    """Tokens of the whole run, in place of steps: so many steps as read at least that."""
    global_batch_tokens: Whole | None = None
    """Tokens per step, in place of global_batch: a multiple of data.seq_len."""
    micro_batch: Size = 8
    """Sequences that a rank takes at once."""
    engine: Literal["auto", "single", "ddp", "zero1", "fsdp2", "hsdp", "fsdp1", "deepspeed"] = "auto"
    """How ranks share the work. auto: what accelerate's configuration asks for; under torchrun, which asks for nothing, fsdp2; in one
    process that nothing launched, single, which any engine comes to there, and says so."""
    shard_ranks: Size | None = None
    """hsdp: ranks among which one copy of parameters and state is sharded, a node's, say; the copies are replicas. None: as accelerate's
    parallelism_config says, else all."""
    tensor_parallel: Size | None = None
    """fsdp2 with llama, qwen3 and gemma3: neighbouring ranks that split the matrices of each block between them, and read the same samples.
    None: as accelerate's parallelism_config says, else 1."""
    context_parallel: Size | None = None
    """fsdp2 and hsdp: neighbouring ranks that share each sequence, for lengths that one cannot hold. None: as accelerate's
    parallelism_config says (cp_size), else 1."""
    offload: Literal["off", "serial", "overlap"] | None = None
    """fsdp2 and hsdp: parameters, gradients and optimizer state in host memory, where the CPU steps them; serial: the device waits for the
    step; overlap: it goes on with the next forward, whose modules wait for their own parameters (Anon only; the same bits, so this is what
    None comes to). None: offloaded if accelerate's configuration says so."""
    accumulate: Literal["sharded", "whole"] | None = None
    """fsdp2, hsdp, fsdp1: how gradients of several micro-batches are summed. sharded: reduced after each micro-batch, so that a rank keeps
    its share only; whole: on every rank in full, 4 bytes a parameter more, and reduced once a step. None: sharded, but whole for bf16-true,
    which would sum shares in bfloat16."""
    deepspeed_config: Place | None = None
    """deepspeed: JSON file, such as those in configs/deepspeed. None: the one in accelerate's configuration, else ZeRO stage 2."""
    precision: Literal["fp32", "bf16", "fp16", "bf16-true", "fp8"] = "fp32"
    """Dtype of the computation; parameters are float32 all the same, but for bf16-true: there parameters and gradients are bfloat16 without
    a float32 copy, and Anon rounds them stochastically (engines single, ddp, fsdp2, hsdp). fp16: engine deepspeed on GPUs only. fp8: bf16
    whose linear layers multiply in 8 bits (torchao; engines single, ddp, fsdp2; GPUs of compute capability 8.9 or more)."""
    grad_clip: Positive | None = 1.0
    """Largest global gradient norm. None: not clipped."""
    max_skipped: StepsOrZero = 10
    """A step with a non-finite gradient is skipped on every rank, as spikes are where on_spike says so; more than so many in a row end the
    run."""
    on_spike: Literal["record", "skip", "rewind"] = "record"
    """What to do about a step whose loss or gradient norm is not finite, or lies above the mean of the last 128 steps by more than
    spike_sigma standard deviations. record: only say it; skip: take no step; rewind: no step, and back to the last checkpoint, to go on
    from it with the samples that come after."""
    spike_sigma: Positive = 6.0
    """See on_spike."""
    max_rewinds: Whole = 3
    """How often a run may go back from a spike; once more ends it."""
    activation_checkpointing: Annotated[
        Literal["none", "full", "selective", "budget"], Instead({True: "full", False: "none"})
    ] = "none"
    """Which activations of a block are computed again in the backward pass instead of kept. full: all, from the block's input. selective:
    all but the results of attention and of every second matrix product. budget: what torch.compile chooses, so that activation_budget of
    what it would keep is kept."""
    activation_budget: Share = 0.5
    """Share of the activations that budget keeps."""
    compile: Annotated[Literal["none", "blocks", "whole"], Instead({True: "blocks", False: "none"})] = "none"
    """What torch.compile makes code of. blocks: the transformer blocks, one like the other; whole: all from the tokens to the logits, which
    takes long, and again for every shape."""
    loss: Literal["auto", "chunked", "torch", "liger", "whole"] = "auto"
    """How the cross-entropy is computed. chunked: from logits of a piece of the tokens at a time, in float32; torch: by torch 2.13's
    linear_cross_entropy, in fp32 only; liger: by Liger's kernels, on GPUs (pip install 'anon-dist[liger]'); whole: from all logits at once,
    as transformers does. auto: chunked, but whole, and said, for a model that does more to its logits than scale and cap them."""
    z_loss: NotNegative = 0.0
    """Weight of logsumexp(logits)² beside the cross-entropy of a token, which keeps logits from growing; 1e-4 is usual."""
    tf32: bool = True
    """In precision fp32 on a GPU: products of float32 matrices in TF32, with 10 bits of mantissa; never those of Anon's bases."""
    deterministic: bool = False
    """Deterministic algorithms on CUDA, for bit-identical resumes; slower. (CPU runs are deterministic without.)"""
    seed: Seed = 0
    """Initial weights and dropout."""
    timeout_minutes: Minutes = 10.0
    """Ranks that make no progress for longer than this in a step or a validation end with an error, which names those that keep the others
    waiting; so do ranks that wait as long for each other when they start."""
    first_timeout_minutes: Minutes | None = None
    """The same for the first step and the first validation, which compile and connect, and for loading, saving, tasks and the end. None:
    30, or timeout_minutes if that is more."""


@dataclass
class EvalConfig:
    every: StepsOrZero = 200
    """Steps between validations; 0: only after the last step."""
    sequences: Whole = 256
    """Validation sequences of each source or set, always the same ones; 0: the whole split."""
    sets: dict[Text, Place] = field(default_factory=dict)
    """Name → folder made by `anon-dist data prepare`, with the data's tokenizer: its validation split (or all, if it has none) is validated
    on, and nothing else. It has no part in val_loss, which is the mean over the sources by their weights."""
    final_sequences: Whole = 0
    """The same for the last validation, whose result is the run's."""
    tasks: tuple[Text, ...] = ()
    """Tasks of lm-eval (pip install lm-eval), by name or by YAML file, whose scores go into the metrics; those that score given text."""
    tasks_every: StepsOrZero = 0
    """Steps between evaluations on the tasks; 0: only after the last step."""
    tasks_path: Place | None = None
    """Folder of your own task files (lm-eval's --include_path)."""
    tasks_limit: Size | None = None
    """Documents of each task. None: all."""
    tasks_fewshot: Whole | None = None
    """Worked examples before each question. None: as the task says."""


@dataclass
class CheckpointConfig:
    every: StepsOrZero = 500
    """Steps between checkpoints; 0: only at the end, or when the run is stopped."""
    keep: Size = 2
    """How many of the latest checkpoints stay."""
    keep_every: StepsOrZero = 0
    """Steps between checkpoints that stay for ever, besides the latest; they are written whatever every says. Where one cannot
    be written, the one in its place stays. 0: none stay."""
    keep_steps: tuple[Steps, ...] = ()
    """Steps of which checkpoints are written, and stay for ever, besides."""
    async_save: bool = True
    """Whether checkpoints are written while the training goes on, from a copy in host memory of what each rank holds of weights and
    optimizer state. One is written at a time."""
    remote: Place | None = None
    """Address, as fsspec has it (s3://bucket/run, gs://…, file:///…), to which each checkpoint is copied in the background. Local ones
    go only when they are complete there, and resume: auto looks there too. One for each run."""


@dataclass
class LogConfig:
    every: Steps = 10
    """Steps between records of the metrics."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """Where the metrics go besides metrics.jsonl."""
    profile_steps: tuple[Steps, Steps] | None = None
    """First and last step of which the first rank writes a trace of torch's profiler, and each rank with a GPU a snapshot of its memory,
    into run_dir/profile. None: nothing is recorded."""
    project: Text = "anon_dist"
    """Project name for the trackers."""
    sample_prompt: Text | None = None
    """Text that the exported model continues at the end of the run, as a sample."""


CALLED: dict[str, dict[str, str]] = {
    "train.engine": {
        "fsdp": "fsdp2",
        "dp": "ddp",
        **dict.fromkeys(("zero2", "zero3", "zero"), "deepspeed (train.deepspeed_config says the stage)"),
    },
    "train.precision": {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "half": "fp16", "float8": "fp8"},
}
"""Of fields, what their values are called elsewhere, and here."""


@dataclass
class Config:
    """Pretraining of a GPT-style model."""

    __pydantic_config__: typing.ClassVar[dict[str, typing.Any]] = {
        "extra": "forbid",
        "strict": True,
        "allow_inf_nan": False,
    }

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run_dir: Place = "runs/default"
    """Folder of the run: checkpoints, metrics, the exported model."""
    resume: Place = "auto"
    """auto: go on from the latest checkpoint in run_dir that is not damaged, if there is one. never: start afresh. Or a checkpoint's
    folder; if it is an older one of this run, the later ones are renamed."""
