"""The plan: against sums done by hand, against models that transformers builds, and against what two ranks keep and send."""

import json

import pytest
import torch

from anon_dist.bench import scaling
from anon_dist.bench.bases import cost
from anon_dist.bench.memory import NAMED, Bases, Job, handed_out, memory, owned_elements, shares
from anon_dist.bench.messages import Message, traffic
from anon_dist.bench.options import ENGINES, Hardware, ScalingOptions
from anon_dist.bench.peak import growth, lasting_bytes
from anon_dist.bench.plan import predict
from anon_dist.bench.shapes import MODELS, Shape, config_of, find_shape
from anon_dist.cli import main
from anon_dist.optim import Anon, param_groups
from anon_dist.optim.frame import BASIS_KEYS
from anon_dist.train.config.parsing import ConfigError
from anon_dist.train.loss.attach import attach
from anon_dist.train.loss.batch import mean_loss
from anon_dist.train.model.build import blocks, build_model
from anon_dist.train.model.flops import flops_per_token
from anon_dist.train.model.recompute import recompute

TINY = Shape("llama", layers=2, width=8, heads=2, kv_heads=1, hidden=24, vocab=10, context=16, tied=False)
GPT2 = Shape("gpt2", layers=2, width=15, heads=3, kv_heads=3, hidden=60, vocab=101, context=16, tied=True)


@pytest.mark.parametrize(("name", "count"), [("7b", 6_738_415_616), ("70b", 68_976_648_192), ("405b", 405_853_388_800)])
def test_known_parameter_counts(name, count):
    assert sum(p.numel for p in MODELS[name].parameters()) == count


SHAPES = [
    TINY,
    GPT2,
    Shape("llama", 1, 8, 2, 2, 16, 12, 16, tied=True),
    Shape("qwen3", 2, 24, 4, 2, 40, 10, 16, tied=False, head_dim=8),
    Shape("gemma3", 7, 24, 4, 1, 40, 10, 16, tied=True, head_dim=10, window=5),
    Shape("olmo2", 2, 24, 4, 2, 40, 10, 16, tied=False),
    Shape("mixtral", 2, 24, 4, 2, 40, 10, 16, tied=False, experts=5, experts_per_token=3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.family)
def test_shapes_are_those_of_the_built_model(shape):
    model = build_model(config_of(shape), shape.vocab, 0, 16)
    assert sorted(p.shape for p in shape.parameters()) == sorted(tuple(p.shape) for p in model.parameters())
    assert shape.flops_per_token(16) == pytest.approx(flops_per_token(model, 16), rel=1e-12)


def test_fsdp2_by_hand():
    """TINY has blocks of 64 + 32 + 32 + 64 + 3 · 192 + 2 · 8 = 784 elements, an embedding and an output matrix of 80, and a norm of 8.

    On 3 ranks, 8 rows are 3 + 3 + 2, 4 rows 2 + 2 + 0, 10 rows 4 + 4 + 2, 24 rows 8 each.
    """
    job = Job(TINY, ranks=3, seq_len=16, bf16=True)
    block = 3 * 8 + 2 * 8 + 2 * 8 + 3 * 8 + 2 * 8 * 8 + 3 * 24 + 2 * 3
    owned = 2 * block + 4 * 8 + 3 + 4 * 8
    assert owned_elements("fsdp2", job) == owned
    needed = memory("fsdp2", job, NAMED["anon"])
    assert (needed.parameters, needed.gradients, needed.state) == (4 * owned, 4 * owned, 12 * owned)
    gather, reduce = traffic("fsdp2", job)
    # blocks and embedding twice, norm and output once, in bfloat16; two thirds of it leave a rank
    assert gather.sent == pytest.approx(2 * 3 * (2 * 2 * block + 2 * 32 + 35) * 2 / 3)
    assert reduce.sent == pytest.approx(4 * 3 * owned * 2 / 3)


def test_whole_parameters_go_to_whoever_has_least():
    model = build_model(config_of(GPT2), GPT2.vocab, 0, 16)
    sizes = [0, 0, 0]
    for matrices in (True, False):
        for p in sorted((p for p in model.parameters() if (p.dim() > 1) == matrices), key=lambda p: -p.numel()):
            sizes[sizes.index(min(sizes))] += p.numel()
    assert handed_out(GPT2.parameters(), 3) == sizes


def test_bytes_of_states_and_of_a_step():
    assert [NAMED[name].state_bytes for name in ("anon", "anon-bf16", "anon-bf16-m", "adamw")] == [12, 8, 6, 8]
    assert NAMED["anon-8bit-m"].state_bytes == 5 + 1 / 32
    assert NAMED["adamw"].moved(1.0, 1.0) == 28
    assert [NAMED["anon"].moved(*x) for x in ((0, 0), (1, 0), (1, 1))] == [24, 32, 36]
    assert NAMED["anon"].moved(0, 0, stored=2) == 18
    accumulating, refreshing = shares(
        100_000, 2.0, 0.95, "auto"
    )  # 17 powers of 2; windows of 325 steps, or all where they are closer
    assert refreshing == 17e-5
    assert accumulating == pytest.approx((512 + 7 * 325 + 0) / 1e5, rel=0.2)


def test_bases_are_those_that_the_optimizer_makes():
    """Of a built model: 4 bytes for each element of the bases and covariances that Anon allocates."""
    for shape in (TINY, GPT2):
        model = build_model(config_of(shape), shape.vocab, 0, 16)
        for sides in ("columns", "both"):
            optimizer = Anon(param_groups(model, basis=sides), basis_block=7)
            optimizer.init_state()
            states = [s[key] for s in optimizer.state.values() for key in BASIS_KEYS if key in s]
            found = cost("ddp", Job(shape, 2, seq_len=16), Bases(sides, 7))
            assert found.bytes == sum(4 * x.numel() for x in states)
            assert found.refresh_bytes == 0


def test_bases_by_hand():
    """TINY's matrices have 8 columns, and 24 for down, in blocks of 8. Each of 3 ranks has all, and sends 4/3 of the covariances."""
    sides = [8, 8, 8, 8, 8, 8, 24]
    elements = 8 * (2 * sum(sides) + 8 + 8)
    found = cost("fsdp2", Job(TINY, 3, seq_len=16), Bases("columns", 8))
    assert found.bytes == 8 * elements
    assert found.refresh_bytes == pytest.approx(4 * elements * 4 / 3)
    matrices = owned_elements("fsdp2", Job(TINY, 3, seq_len=16)) - (2 * 2 * 3 + 3)
    assert (found.turned, found.step_flops) == (matrices, 4 * 8 * matrices)


def test_bases_in_stage_3_where_rows_divide():
    """As under FSDP2. TINY has matrices of 8, 4, 24 and 10 rows, of which two divide among 4 ranks not, those of the vocabulary."""
    bases = Bases("columns", 8)
    two, four = (Job(TINY, ranks, seq_len=16) for ranks in (2, 4))
    assert cost("zero3", two, bases) == cost("fsdp2", two, bases)
    row = predict("zero3", "anon-columns", two, Hardware(), 0.4, 1000)
    assert row.trouble is None
    plain = predict("zero3", "anon-bf16", two, Hardware(), 0.4, 1000)
    assert row.memory.state - plain.memory.state == cost("zero3", two, Bases("columns")).bytes
    assert (
        0
        < row.sent["all-reduce"]
        == shares(1000, max_interval=4)[1] * cost("zero3", two, Bases("columns")).refresh_bytes
    )
    assert predict("zero3", "anon-columns", four, Hardware(), 0.4, 1000).trouble == "rows of 2 matrices do not divide"


def test_bases_of_both_sides_where_ranks_have_whole_blocks_of_rows():
    """As the optimizer refuses them. Each of TINY's two blocks has matrices of 8 rows (three), 4 (two) and 24 (two)."""
    for engine, ranks, block, trouble in (
        ("fsdp2", 2, 4, "blocks of 4 matrices lie across shards"),
        ("fsdp2", 2, 2, None),
        ("fsdp2", 3, 2, "blocks of 6 matrices lie across shards"),
        ("zero3", 3, 2, "rows of 10 matrices do not divide"),
        ("ddp", 3, 4, None),
        ("zero1", 3, 4, None),
    ):
        job = Job(TINY, ranks, seq_len=16)
        assert predict(engine, "anon-both", job, Hardware(), 0.4, 1000, block).trouble == trouble, (engine, ranks)


def test_bases_are_small_beside_a_large_model(capsys):
    """Width 4,096, 32 layers, blocks of 128: on every rank, at most 0.25 bytes for each parameter of the whole model."""
    gpt2 = Shape("gpt2", 32, 4096, 32, 32, 4 * 4096, 50304, 4096, tied=True)
    for name, shape in (("gpt2", gpt2), ("llama", MODELS["7b"])):
        job, whole = Job(shape, 64), sum(p.numel for p in shape.parameters())
        found = cost("fsdp2", job, Bases("columns"))
        with capsys.disabled():
            print(
                f"\n{name}: {found.bytes / whole:.3f} bytes of bases and covariances a parameter ({found.bytes / 1e9:.2f} GB)"
            )
        assert 0.1 < found.bytes / whole <= 0.25
        assert found.bytes == cost("fsdp2", Job(shape, 512), Bases("columns")).bytes
        # the turns on top of a step: 0.67 b / tokens of it
        turns, step = 64 * found.step_flops, shape.flops_per_token(4096) * job.tokens * 64
        assert turns / step == pytest.approx(0.67 * 128 / (64 * 4096), rel=0.3)


def test_links():
    hardware = Hardware(nvlink=450.0, network=50.0, per_node=8)
    inside, across = Message("all-gather", 8000.0, 8), Message("all-gather", 16000.0, 16)
    assert inside.seconds(hardware) == 7000 / 450
    assert across.seconds(hardware) == 15000 / 400  # eight cards share a ring's bytes
    assert Message("all-reduce", 100.0, 2, stride=8).seconds(hardware) == 100 / 50


def test_what_does_not_fit():
    big = Job(MODELS["405b"], 64, seq_len=4096)
    assert "GB too much" in predict("ddp", "anon", big, Hardware(), 0.4, 1000).trouble
    roomy = predict("fsdp2", "anon", Job(MODELS["7b"], 64), Hardware(), 0.4, 1000)
    assert roomy.trouble is None
    assert predict("fsdp2", "anon", Job(MODELS["7b"], 64), Hardware(memory=10e9), 0.4, 1000).trouble is not None
    pure = Job(MODELS["7b"], 64, pure=True)
    assert predict("fsdp2", "anon", pure, Hardware(), 0.4, 1000).trouble is None
    assert predict("zero2", "anon", pure, Hardware(), 0.4, 1000).trouble == "no bf16-true"
    assert "needs Anon" in predict("fsdp2", "adamw", pure, Hardware(), 0.4, 1000).trouble
    assert "cannot split" in predict("fsdp2+tp", "anon", Job(GPT2, 8, tensor=2), Hardware(), 0.4, 1000).trouble
    offload = memory("zero3-offload", big, NAMED["anon"])
    assert offload.state == 0 < offload.host


def test_command(tmp_path, capsys):
    out = tmp_path / "plan.json"
    main(["bench", "plan", "--model", "llama-1b", "--ranks", "16", "--json", str(out), "--hardware.hbm", "1e12"])
    written = json.loads(out.read_text())
    assert {row["engine"] for row in written["rows"]} == set(ENGINES)
    assert written["hardware"]["hbm"] == 1e12
    assert "Predicted, not measured" in capsys.readouterr().out
    row = next(r for r in written["rows"] if (r["engine"], r["optimizer"]) == ("fsdp2", "adamw"))
    assert row["optimizer_s"] == pytest.approx(28 * row["memory"]["state"] / 8 / 1e12)
    with pytest.raises(SystemExit, match="--model nothing is none of 7b"):
        main(["bench", "plan", "--model", "nothing"])
    with pytest.raises(ConfigError, match="is none of"):
        find_shape("nothing", 100)


def test_predictions_are_what_two_ranks_measure(tmp_path):
    pytest.importorskip("deepspeed")
    config = tmp_path / "odd.yaml"  # sizes that divide by nothing
    config.write_text("model: {family: gpt2, layers: 2, width: 45, heads: 5, context: 32, pad_vocab_to: 1}\n")
    out = tmp_path / "scaling.json"
    engines = ["ddp", "zero1", "fsdp2", "zero1-deepspeed", "zero3"]
    arguments = ["--model", str(config), "--vocab", "101", "--ranks", "2", "--seq-len", "32", "--steps", "1"]
    main(["bench", "scaling", *arguments, "--engines", *engines, "--check", "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(r["engine"], r["optimizer"]) for r in rows] == [(e, o) for e in engines for o in ("anon", "adamw")]
    for row in rows:
        assert row["state"] == row["state_predicted"] > 0, row
        assert row["sent"] == pytest.approx(row["sent_predicted"], rel=0.03), row
        # the kernel's own count; messages have heads, which at this size are a few percent
        assert row["sent_by_gloo"] < row["written"] < 1.1 * row["sent_by_gloo"], row


FAMILIES = {
    "gpt2": {},
    "llama": {"kv_heads": 2, "tied": False},
    "qwen3": {"kv_heads": 1, "head_dim": 24},
    "gemma3": {"kv_heads": 2, "head_dim": 24, "window": 32, "layers": 6},
    "olmo2": {"kv_heads": 2, "tied": False},
    "mixtral": {"kv_heads": 2, "tied": False, "experts": 4, "experts_per_token": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("checkpointing", "precision", "loss"),
    [
        ("none", "fp32", "chunked"),
        ("selective", "bf16", "chunked"),
        ("full", "bf16", "whole"),
        ("none", "bf16-true", "chunked"),
    ],
)
def test_peaks_are_those_that_torch_allocates(family, checkpointing, precision, loss):
    """A step of a small model, not compiled, on the CPU: all that its tensors take at once beside what lasts."""
    sizes = {"layers": 3, "width": 64, "heads": 4, "kv_heads": 4, "hidden": 224, "vocab": 700, "context": 128}
    shape = Shape(family, **{**sizes, "tied": True, **FAMILIES[family]})
    model = build_model(config_of(shape), shape.vocab, 0, 128, seed=1)
    pure = precision == "bf16-true"
    model.to(torch.bfloat16 if pure else torch.float32)
    attach(model, "whole" if loss == "whole" else "auto")
    recompute(blocks(model), checkpointing)
    optimizer = Anon(param_groups(model), stochastic_rounding=pure)
    optimizer.init_state()
    samples = torch.randint(0, shape.vocab, (4, 129))
    for _ in range(2):  # the first allocates what lasts
        with growth(torch.device("cpu")) as most:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                value = mean_loss(model, samples)
            value.backward()
            del value
            optimizer.step()
            optimizer.zero_grad()
    sizes = {
        "micro_batch": 4,
        "seq_len": 128,
        "bf16": precision != "fp32",
        "pure": pure,
        "checkpointing": checkpointing,
    }
    job = Job(shape, 1, **sizes, whole_logits=loss == "whole", device="cpu", compiled=False)
    planned = memory("ddp", job, NAMED["anon"])
    lasting = planned.parameters + planned.state
    assert lasting_bytes(model, optimizer) == pytest.approx(lasting, rel=0.01)  # rotary frequencies, counters
    assert lasting + most() == pytest.approx(planned.device, rel=0.12)


def test_a_difference_is_reported():
    job = scaling.job_of(ScalingOptions(), 2)
    sent = sum(m.sent for m in traffic("ddp", job))
    values = {"step_s": 1.0, "optimizer_s": 1.0, "state_bytes": 12 * owned_elements("ddp", job), "written": None}
    wrong = [{"stream": 1e9, "engines": {"ddp": {"anon": {**values, "sent": {"all-reduce": 1.1 * sent}}}}}] * 2
    (row,) = scaling.rows_of(job, wrong)
    assert len(row.differences) == 1
    assert "bytes sent" in row.differences[0]


def test_torch_counts_what_the_plan_calls_an_adamw():
    p = torch.nn.Parameter(torch.ones(32))
    p.grad = torch.ones(32)
    adamw = torch.optim.AdamW([p])
    adamw.step()
    kept = sum(v.numel() * v.element_size() for v in adamw.state[p].values() if v.dim())
    assert kept == 32 * NAMED["adamw"].state_bytes


def test_what_is_computed_again_takes_time():
    """7b: a forward pass of the blocks is a third of all but the output's; every second of its products less than half of that."""
    shape, head = MODELS["7b"], 6 * 32000 * 4096
    none, selective, full = (
        predict("fsdp2", "anon", Job(shape, 8, checkpointing=how), Hardware(), 0.4, 1000).compute_s
        for how in ("none", "selective", "full")
    )
    counted = shape.flops_per_token(Job(shape, 8).seq_len)
    assert full / none == pytest.approx(1 + (counted - head) / counted / 3, rel=1e-3)
    assert 1.0 < selective / none < 1 + (full / none - 1) / 2


def test_sharing_sequences_and_keeping_less():
    """7b in sequences of 32k on 4 ranks each: a quarter of the activations and of the computation, and a layer's keys and values."""
    shape = MODELS["7b"]
    alone, shared = (Job(shape, 64, seq_len=32768, context=n, accumulation=2) for n in (1, 4))
    layer, head = 2 * 4096 * 2 * 32768, 4 * 32000 * 4096  # the gradient of the output matrix is there by then
    activations = [memory("fsdp2", job, NAMED["anon"]).activations - head for job in (alone, shared)]
    assert activations[1] == pytest.approx(activations[0] / 4 + layer)
    rows = [predict("fsdp2", "anon", job, Hardware(), 0.4, 1000) for job in (alone, shared)]
    assert rows[1].compute_s == pytest.approx(rows[0].compute_s / 4)
    more = sum(rows[1].sent.values()) - sum(rows[0].sent.values())
    assert more == pytest.approx(2 * 3 * 32 * layer * 3 / 4)  # gathered twice, and reduced; three quarters leave a rank
    assert "cannot share" in predict("ddp", "anon", shared, Hardware(), 0.4, 1000).trouble
    kept = {
        how: memory("fsdp2", Job(shape, 64, checkpointing=how), NAMED["anon"]).activations
        for how in ("none", "full", "selective")
    }
    assert kept["full"] < kept["selective"] < kept["none"]
