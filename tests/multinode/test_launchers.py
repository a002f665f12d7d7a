"""What starts and stops runs on two hosts: batch systems, DeepSpeed's launcher, an elastic torchrun; stand-ins for what is not here."""

import signal
import sys
import textwrap

import pytest
import yaml
from helpers import metrics
from two_hosts import INTERFACE, ROOT, SCRIPTS, Launch, programs

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.slow
def test_slurm_stops_a_run_before_the_limit_and_queues_it_again(hosts, config, tmp_path):
    """The batch script, with stand-ins for srun (a task per host, signals passed on to all) and scontrol."""
    texts = {
        "srun": f"""
            import os, signal, subprocess, sys
            task = [word for i, word in enumerate(sys.argv[1:]) if "bash" in sys.argv[1 : i + 2]]
            tasks = [
                subprocess.Popen(["ip", "netns", "exec", host, *task], env={{**os.environ, "SLURM_NODEID": str(i)}})
                for i, host in enumerate({[host.name for host in hosts]})
            ]
            signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
            sys.exit(max(task.wait() for task in tasks))
        """,
        "scontrol": f"""
            import sys
            if sys.argv[1:] == ["show", "hostnames", "node-[1-2]"]:
                print("{hosts[0].address}\\n{hosts[1].address}")
            else:
                print("scontrol", *sys.argv[1:])
        """,
    }
    job = Launch(
        ["bash", str(SCRIPTS / "slurm.sbatch"), "--config", str(config), "--run-dir", str(tmp_path / "run")],
        tmp_path / "log",
        **programs(tmp_path, **texts),
        VENV=sys.prefix,
        ACCELERATE_CONFIG="configs/accelerate/fsdp2-cpu-multinode.yaml",
        INTERFACE=INTERFACE,
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_ID="7",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="node-[1-2]",
        SLURM_GPUS_ON_NODE="1",
    )
    job.until("step=5 ")
    job.process.send_signal(signal.SIGUSR1)
    assert job.ends() == 0, job.output
    assert "Stopped by SIGUSR1 after step" in job.output
    assert "scontrol requeue 7" in job.output


@pytest.mark.slow
def test_a_run_that_loses_a_node_goes_on_with_the_other_at_the_same_global_batch(hosts, config, on_one_host, tmp_path):
    """MAX_RESTARTS, with c10d: the launcher that is left starts its rank again, alone."""
    options = ("--config", str(config), "--run-dir", str(tmp_path / "run"), "--train.engine", "fsdp2")
    elastic = {"NODES": "1:2", "RENDEZVOUS": "c10d", "MAX_RESTARTS": "2", "DOCTOR": "1"}
    here, there = (host.start("torchrun.sh", tmp_path, *options, **elastic) for host in hosts)
    here.until("step=24 ")
    assert "No check failed" in here.output  # the doctor, before
    hosts[1].kill()
    there.ends()
    assert here.ends() == 0, here.output
    assert "fsdp2 on 2 cpu ranks" in here.output
    assert "fsdp2 on 1 cpu rank;" in here.output
    assert here.output.index("fsdp2 on 1 cpu rank;") > here.output.index("fsdp2 on 2 cpu ranks")
    found, expected = metrics(tmp_path / "run"), metrics(on_one_host)
    assert [r.get("loss") for r in found] == [pytest.approx(r.get("loss"), abs=1e-4) for r in expected]


@pytest.mark.slow
def test_deepspeeds_launcher_reaches_the_hosts_and_trains_like_one(hosts, config, on_one_host, tmp_path):
    """By its host file, with stand-ins for ssh and pdsh that enter the hosts; from outside, after a look at them."""
    enter = """
        def enter(host, command, **more):
            hosted = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c"]
            clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}  # as sshd has it
            return subprocess.Popen([*hosted, f"echo {host} > /proc/sys/kernel/hostname; {command}"], env=clean, **more)
    """
    ssh = """
        import os, subprocess, sys
        words = sys.argv[1:]
        while words[0].startswith("-"):
            words = words[2:] if words[0] in ("-o", "-p") else words[1:]
        sys.exit(enter(words[0], " ".join(words[1:])).wait())
    """
    pdsh = """
        import os, subprocess, sys
        words = sys.argv[1:]
        names = words[words.index("-w") + 1].split(",")
        command = " ".join(words[words.index("-w") + 2 :])
        running = [enter(name, command.replace("%n", str(i))) for i, name in enumerate(names)]
        sys.exit(max(process.wait() for process in running))
    """
    both = {name: textwrap.dedent(enter) + textwrap.dedent(text) for name, text in (("ssh", ssh), ("pdsh", pdsh))}
    (tmp_path / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    variables = {"HOSTFILE": str(tmp_path / "hostfile"), "INTERFACE": INTERFACE, "VENV": str(tmp_path), "DOCTOR": "1"}
    options = ("--config", str(config), "--run-dir", str(tmp_path / "run"), "--train.engine", "deepspeed")
    command = ["bash", str(SCRIPTS / "deepspeed.sh"), *options]
    variables |= {"MASTER_ADDR": hosts[0].address} | programs(tmp_path, **both)
    launch = Launch(command, tmp_path / "log", **variables)
    assert launch.ends() == 0, launch.output
    assert f"2 of 2: {hosts[0].name}, {hosts[1].name}" in launch.output
    assert "deepspeed (ZeRO-2) on 2 cpu ranks" in launch.output or "on 2 cpu ranks" in launch.output
    found, expected = metrics(tmp_path / "run"), metrics(on_one_host)
    assert [r.get("loss") for r in found] == [pytest.approx(r.get("loss"), abs=1e-4) for r in expected]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["jobset.yaml", "indexed-job.yaml", "skypilot.yaml"])
def test_a_preempted_pod_ends_all_with_the_code_that_is_no_failure(hosts, config, tmp_path, file):
    """The container's own command, as Kubernetes would start it on each node; SkyPilot's script. Finished, it ends with 0."""
    document = list(yaml.safe_load_all((SCRIPTS / file).read_text()))[-1]
    run = ["--config", str(config), "--run-dir", str(tmp_path / "run")]
    launches = []

    def launch_all() -> list[Launch]:
        launches.clear()
        for host in hosts:
            given = {"VENV": sys.prefix, "INTERFACE": INTERFACE}
            if file == "skypilot.yaml":
                script = document["run"].replace("--config gpt2-small --data.path /shared/data", f"--config {config}")
                command = ["bash", "-c", script.replace("/shared/runs/gpt2-small", str(tmp_path / "run"))]
                given |= document["envs"] | {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "1"}
                given |= {
                    "SKYPILOT_NODE_RANK": str(host.rank),
                    "SKYPILOT_NODE_IPS": "\n".join(h.address for h in hosts),
                }
            else:
                spec = document["spec"]
                spec = spec["replicatedJobs"][0]["template"]["spec"] if document["kind"] == "JobSet" else spec
                (container,) = spec["template"]["spec"]["containers"]
                command = [*container["command"], *run]
                given |= {e["name"]: e["value"] for e in container["env"] if "value" in e}
                given |= {"NODE_RANK": str(host.rank), "RANKS_PER_NODE": "1", "MASTER_ADDR": hosts[0].address}
            prefix = ["ip", "netns", "exec", host.name]
            launches.append(Launch([*prefix, *command], tmp_path / f"log-{host.rank}", **given))
        return launches

    here, there = launch_all()
    here.until("step=5 ")
    there.process.send_signal(signal.SIGTERM)
    assert [there.ends(), here.ends()] == [75, 75], here.output + there.output
    here, there = launch_all()
    assert [here.ends(), there.ends()] == [0, 0], here.output + there.output
    assert "Resuming" in here.output


@pytest.mark.slow
def test_the_doctor_is_a_task_of_torchrun_as_the_training_is(hosts, tmp_path):
    """Its launchers keep the store already, and of a node's ranks one looks."""
    where = ["--nnodes", "2", "--nproc-per-node", "2", "--master-addr", hosts[0].address, "--master-port", "29501"]
    launches = []
    for host in hosts:
        task = ["torchrun", *where, "--node-rank", str(host.rank), "-m", "anon_dist.cli", "doctor"]
        enter = ["ip", "netns", "exec", host.name, "unshare", "--uts", "sh", "-c"]
        enter += ['echo "$0" > /proc/sys/kernel/hostname; exec "$@"', host.name]
        launches.append(Launch([*enter, *task], tmp_path / f"log-{host.rank}", GLOO_SOCKET_IFNAME=INTERFACE))
    assert [launch.ends() for launch in launches] == [0, 0], launches[0].output + launches[1].output
    assert f"2 of 2: {hosts[0].name}, {hosts[1].name}" in launches[0].output
    assert launches[0].output.count("No check failed") == 1
    assert "check" not in launches[1].output
