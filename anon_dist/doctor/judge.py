"""What the nodes' reports mean: a finding for each check, with a remedy where something is wrong."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping

from anon_dist.doctor.nodes import NAMED, Finding, Level, Nodes, Wanted
from anon_dist.doctor.report import Report

SKEW_WARN, SKEW_FAIL = 0.5, 5.0
"""Seconds between two clocks. torchrun's c10d takes a node for lost whose last sign is 15 s old, by the clocks of both."""
SLOW_GPU, SLOW_CPU = 0.9, 0.6
"""A device below this share of the median's speed is slow; CPUs are shared with others."""
SLOW_PAIR = 0.5
"""The same of an all-reduce between two nodes."""
SLOWEST_LINK = 50e6
"""Bytes per second: half of what gigabit Ethernet gives."""
SLOWEST_DISK = 10e6
INTERFACE = "INTERFACE (GLOO_ and NCCL_SOCKET_IFNAME)"
PORTS = (
    "open all TCP ports between the nodes (sysctl net.ipv4.ip_local_port_range; look at nft list ruleset, iptables -S)"
)


def judge(nodes: Nodes, wanted: Wanted | None) -> list[Finding]:
    """A finding for each check, in their order on the screen."""
    found = [_nodes(nodes), _versions(nodes), _devices(nodes)]
    if nodes.count > 1:
        found += [_interfaces(nodes), _ports(nodes), _clocks(nodes)]
    elif any(report.interface.said_by and report.interface.problem for report in nodes.reports.values()):
        found.append(_interfaces(nodes))  # gloo takes it also where a node is alone
    if wanted is not None:
        found += [_run_dir(nodes, wanted), _room(nodes, wanted), *_remote(nodes), _data(nodes)]
    else:
        found.append(Finding("run_dir", "skip", "give --config and --run-dir, to have folder, room and data looked at"))
    return [*found, _products(nodes), *([_pairs(nodes)] if nodes.count > 1 else []), _kernels(nodes)]


def _nodes(nodes: Nodes) -> Finding:
    if len(nodes.reports) == nodes.count:
        return Finding("nodes", "ok", f"{nodes.count} of {nodes.count}: {nodes.all(nodes.reports)}")
    if not nodes.absent:
        return Finding("nodes", "skip", f"this is {nodes.all(nodes.reports)} alone: it did not meet the others")
    why = "; ".join(f"{nodes.name(rank)}: {what}" for rank, what in sorted(nodes.absent.items())[:NAMED])
    return Finding(
        "nodes",
        "fail",
        f"{nodes.count - len(nodes.absent)} of {nodes.count}; {why}",
        "see what the doctor says there: is it started, with this master address and port, and is the node up",
    )


def _versions(nodes: Nodes) -> Finding:
    if broken := {rank: r.unimportable for rank, r in nodes.reports.items() if r.unimportable}:
        text = "; ".join(
            f"{nodes.name(rank)}: {name}: {why}" for rank, of in broken.items() for name, why in of.items()
        )
        return Finding(
            "versions",
            "fail",
            f"cannot be imported: {text}",
            "install them anew there (launch/setup.sh); if they are whole, see what shadows them on PYTHONPATH",
        )
    names = dict.fromkeys(name for report in nodes.reports.values() for name in report.versions)
    different = {n: text for n in names if (text := nodes.differences(lambda r, n=n: r.versions.get(n, "missing")))}  # type: ignore[misc]
    if different:
        text = "; ".join(f"{name} {what}" for name, what in different.items())
        return Finding(
            "versions", "fail", text, "install the same everywhere (constraints.txt), and have the same clone"
        )
    first = next(iter(nodes.reports.values()), None)
    shown = {} if first is None else first.versions
    return Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in shown.items()))


def _devices(nodes: Nodes) -> Finding:
    if broken := {rank: r.device_problem for rank, r in nodes.reports.items() if r.device_problem}:
        text = "; ".join(f"{nodes.name(rank)}: {what}" for rank, what in broken.items())
        return Finding(
            "devices",
            "fail",
            text,
            "nvidia-smi must list them, and torch be a build for CUDA no newer than the driver's",
        )

    def whole(report: Report) -> str:
        return ", ".join(
            f"{report.devices.count(d)} x {d}" if report.gpus else d for d in dict.fromkeys(report.devices)
        )

    driver = next((f", driver {r.driver}" for r in nodes.reports.values() if r.driver), "")
    if text := nodes.differences(lambda r: f"{r.gpus} GPUs, driver {r.driver}" if r.gpus else "no GPU"):
        return Finding("devices", "fail", text, "take nodes with the same number of GPUs and the same driver")
    different = nodes.differences(whole)
    first = next(iter(nodes.reports.values()), None)
    text = different or ("" if first is None else whole(first) + driver)
    backend = "" if first is None else f"; {first.backend}"
    return Finding(
        "devices", "warn" if different else "ok", text + backend, "the slowest sets the pace" * bool(different)
    )


def _wrong_interfaces(nodes: Nodes) -> dict[int, str]:
    """Nodes whose interface cannot be the right one, and why."""
    found = {}
    for rank, report in nodes.reports.items():
        own = report.interface
        asked = [other.peers[rank] for other in nodes.reports.values() if rank in other.peers]
        said = own.said_by or "nothing names one (GLOO_SOCKET_IFNAME)"
        if own.problem:
            found[rank] = f"{said}: {own.problem} ({', '.join(own.present)} are there)" if own.said_by else own.problem
        elif own.is_loopback:
            by_name = f"; the name {report.host} leads to {own.address}" if not own.said_by else ""
            found[rank] = f"{said}{by_name}: no other node can reach the loopback"
        elif asked and all(peer.problem for peer in asked) and own.towards not in ("", own.name):
            what = own.said_by or f"the name {report.host} leads to {own.address}, of {own.name}"
            found[rank] = f"{what}: no node reaches {own.address}, and packets to node 0 leave by {own.towards}"
    return found


def _looping(nodes: Nodes, wrong: Mapping[int, str]) -> dict[int, str]:
    """What MASTER_ADDR is on nodes where it leads to the loopback, if that is a fault: of one that meets nobody, or whose interface is
    wrong besides, which its packets to node 0 then do not tell."""
    alone = all(rank == 0 or report.meeting for rank, report in nodes.reports.items())
    return {
        rank: report.interface.looping
        for rank, report in nodes.reports.items()
        if report.interface.looping and (rank in wrong or report.meeting or (rank == 0 and alone))
    }


def _loopback_finding(nodes: Nodes, wrong: Mapping[int, str], looping: Mapping[int, str], text: str) -> Finding:
    """Of a MASTER_ADDR by which a node reaches itself alone, and of interfaces that are wrong besides (`text`)."""
    what = f"MASTER_ADDR leads to the loopback on {nodes.all(looping)} ({next(iter(looping.values()))})"
    zero = nodes.reports.get(0)
    reachable = [] if zero is None else zero.interface.reachable
    which = f": {' or '.join(reachable[:NAMED])}" if reachable else " (ip -br address lists them there)"
    remedy = f"give as MASTER_ADDR (--master-addr) an address of node 0 that the others reach{which}"
    if wrong:
        present = [nodes.reports[rank].interface.present for rank in wrong]
        named = {names[0] if len(names) == 1 else "the interface between the nodes" for names in present}
        remedy += f"; and set {INTERFACE} to {' or '.join(sorted(named))} on {nodes.all(wrong)}"
    return Finding("interface", "fail", f"{what}; {text}" if text else what, remedy)


def _interfaces(nodes: Nodes) -> Finding:
    wrong = _wrong_interfaces(nodes)
    text = "; ".join(f"{nodes.name(rank)}: {what}" for rank, what in wrong.items())
    if looping := _looping(nodes, wrong):
        return _loopback_finding(nodes, wrong, looping, text)
    if wrong:
        if nodes.count == 1:
            variable = next(iter(nodes.reports.values())).interface.said_by.partition("=")[0]
            return Finding("interface", "fail", text, f"unset {variable}, or name an interface that is there")
        right = {nodes.reports[rank].interface.towards or "the interface between the nodes" for rank in wrong}
        return Finding("interface", "fail", text, f"set {INTERFACE} to {' or '.join(sorted(right))} there")
    text = ", ".join(dict.fromkeys(r.interface.name or r.interface.address for r in nodes.reports.values()))
    said = nodes.differences(lambda r: r.interface.said_by or "chosen by the library")
    first = next(iter(nodes.reports.values()), None)
    by = said or ("" if first is None else first.interface.said_by or "chosen by the library")
    addresses = ", ".join(r.interface.address for r in list(nodes.reports.values())[:NAMED])
    return Finding("interface", "ok", f"{text} ({addresses}); {by}")


def _ports(nodes: Nodes) -> Finding:
    problems = [f"{nodes.name(rank)}: {r.meeting}" for rank, r in nodes.reports.items() if r.meeting]
    if problems:
        remedy = (
            "another --master-port (MASTER_PORT)"
            if "in use" in problems[0]
            else f"check MASTER_ADDR and MASTER_PORT; {PORTS}"
        )
        return Finding("ports", "fail", "; ".join(problems[:NAMED]), remedy)
    wrong, pairs, slowest = _wrong_interfaces(nodes), 0, 0.0
    for rank, report in nodes.reports.items():
        for other, peer in report.peers.items():
            pairs, slowest = pairs + 1, max(slowest, peer.rtt)
            if peer.problem and other not in wrong:
                address = nodes.reports[other].interface.address if other in nodes.reports else "?"
                problems.append(f"{nodes.name(rank)} does not reach {nodes.name(other)} at {address}: {peer.problem}")
            elif peer.closed:
                problems.append(f"{nodes.name(rank)} does not reach {nodes.name(other)} at {peer.closed}")
    if problems:
        more = f"; and {len(problems) - 2} more" if len(problems) > 2 else ""
        return Finding("ports", "fail", "; ".join(problems[:2]) + more, PORTS)
    if wrong or not pairs:
        return Finding("ports", "skip", "not known until the nodes meet by the right interface")
    return Finding("ports", "ok", f"each node reaches all others, there and back in {1e3 * slowest:.2f} ms at most")


def _clocks(nodes: Nodes) -> Finding:
    zero = nodes.reports.get(0)
    ahead = {} if zero is None else {r: p.ahead for r, p in zero.peers.items() if not p.problem}
    if not ahead:
        return Finding("clocks", "skip", "not compared: node 0 reaches nobody")
    worst = max(ahead, key=lambda rank: abs(ahead[rank]))
    odd = {rank: by for rank, by in ahead.items() if abs(by) > SKEW_WARN}
    text = f"apart by {abs(ahead[worst]):.3f} s at most ({nodes.name(worst)})"
    if not odd:
        return Finding("clocks", "ok", text)
    if len(odd) == len(ahead) > 1 and max(odd.values()) - min(odd.values()) < SKEW_WARN:
        text = f"{nodes.name(0)} is {abs(ahead[worst]):.1f} s {'behind' if ahead[worst] > 0 else 'ahead of'} all others"
    else:
        text = "; ".join(
            f"{nodes.name(r)} is {abs(by):.1f} s {'ahead' if by > 0 else 'behind'}" for r, by in odd.items()
        )
    level: Level = "fail" if abs(ahead[worst]) > SKEW_FAIL else "warn"
    return Finding(
        "clocks", level, text, "have chrony or ntpd set the clocks (timedatectl); c10d takes late nodes for lost"
    )


def _run_dir(nodes: Nodes, wanted: Wanted) -> Finding:
    folders = {rank: r.folder for rank, r in nodes.reports.items() if r.folder is not None}
    if not folders:
        return Finding("run_dir", "skip", "not tried, since the nodes do not meet")
    if broken := {rank: f.problem for rank, f in folders.items() if f.problem}:
        text = "; ".join(f"{nodes.name(rank)}: {what}" for rank, what in list(broken.items())[:NAMED])
        on = ", ".join(dict.fromkeys(folders[rank].device for rank in broken if folders[rank].device))
        return Finding(
            "run_dir",
            "fail",
            f"{wanted.run_dir} cannot be written; {text}",
            _remedy_of(next(iter(broken.values())), on),
        )
    if blind := {rank: f.unseen for rank, f in folders.items() if f.unseen}:
        rank, unseen = next(iter(blind.items()))
        text = f"{wanted.run_dir} is not the same folder everywhere: {nodes.name(rank)} does not see what {nodes.all(unseen)} writes"
        where = nodes.differences(lambda r: r.folder.device if r.folder and r.folder.device else "?")
        where = f" (now {where})" if where else ""
        return Finding("run_dir", "fail", text, f"have one shared file system mounted there on all nodes{where}")
    slowest = min(folders, key=lambda rank: folders[rank].written)
    rate, sync = folders[slowest].written, max(f.sync for f in folders.values())
    by = f" ({nodes.name(slowest)})" if len(folders) > 1 else ""
    shared = "seen by all, " if len(folders) > 1 else ""
    text = f"{wanted.run_dir}: {shared}written at {_size(rate)}/s at least{by}, fsync {1e3 * sync:.1f} ms; {folders[slowest].device}"
    if rate < SLOWEST_DISK:
        return Finding(
            "run_dir", "warn", text, "checkpoints will take long: a faster file system, or a larger checkpoint.every"
        )
    return Finding("run_dir", "ok", text)


def _remedy_of(problem: str, device: str) -> str:
    where = f" ({device})" if device else ""
    if "Read-only" in problem:
        return f"mount it read-write{where}"
    if "No space" in problem or "quota" in problem.lower():
        return f"make room ({f'{device}; ' if device else ''}df -h, quota), or choose another run_dir"
    if "ermission" in problem or "not permitted" in problem:
        return "give your user the right to write there on that node, or choose another run_dir"
    if "is a link" in problem:
        return "mount what it leads to on that node, or choose another run_dir"
    if "is a file" in problem:
        return "remove it, or choose another run_dir"
    return f"choose a run_dir that all nodes can write{where}"


def _room(nodes: Nodes, wanted: Wanted) -> Finding:
    folders = [r.folder for r in nodes.reports.values() if r.folder is not None and r.folder.free]
    if wanted.checkpoint is None or not folders:
        why = "the model's sizes are not in the configuration" if wanted.checkpoint is None else "run_dir was not tried"
        return Finding("room", "skip", f"not known: {why}")
    free, there = min(f.free for f in folders), max(f.checkpoints for f in folders)
    more = max(1, wanted.keep + 1 - there)
    needed = more * wanted.checkpoint
    text = f"a checkpoint is {_size(wanted.checkpoint)}; {wanted.keep} stay while one is written"
    text += f", {there} are there" * bool(there) + f": {_size(needed)} needed, {_size(free)} free"
    if free < needed:
        return Finding("room", "fail", text, "make room, lower --checkpoint.keep, or choose another run_dir")
    return Finding("room", "ok", text)


def _remote(nodes: Nodes) -> list[Finding]:
    found = next((r for r in nodes.reports.values() if r.remote), None)
    if found is None:
        return []
    if found.remote_problem:
        return [Finding("remote", "fail", found.remote_problem, found.remote_remedy)]
    return [Finding("remote", "ok", f"{found.remote}: can be written, and is this run's or nobody's")]


def _data(nodes: Nodes) -> Finding:
    broken = defaultdict[str, list[int]](list)
    for rank, report in nodes.reports.items():
        if report.data_problem:
            broken[report.data_problem].append(rank)
    if broken:
        text = "; ".join(f"{nodes.all(ranks)}: {what}" for what, ranks in list(broken.items())[:NAMED])
        more = f"; and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
        remedies = dict.fromkeys(nodes.reports[ranks[0]].data_remedy for ranks in broken.values())
        return Finding("data", "fail", text + more, "; ".join(remedies))
    if text := nodes.differences(lambda r: r.data or "?"):
        return Finding("data", "fail", f"not the same: {text}", "copy one prepared folder to all nodes, or share it")
    first = next((r.data for r in nodes.reports.values() if r.data), "")
    return (
        Finding("data", "ok", f"the same everywhere ({first})") if first else Finding("data", "skip", "not looked at")
    )


def _products(nodes: Nodes) -> Finding:
    speeds = {(rank, i): f for rank, r in nodes.reports.items() for i, f in enumerate(r.flops)}
    if not speeds:
        return Finding("matmul", "skip", "not measured")
    on_gpus = any(r.gpus for r in nodes.reports.values())
    middle, limit = statistics.median(speeds.values()), SLOW_GPU if on_gpus else SLOW_CPU
    kind = "bfloat16 on GPUs" if on_gpus else "float32 on CPUs"
    slow = {place: f for place, f in speeds.items() if f < limit * middle}
    text = f"{middle / 1e12:.3g} TFLOP/s, {kind}"
    text += f" ({min(speeds.values()) / 1e12:.3g} to {max(speeds.values()) / 1e12:.3g})" if len(speeds) > 1 else ""
    if not slow:
        return Finding("matmul", "ok", text)
    names = "; ".join(
        f"{nodes.name(rank)}{f' GPU {i}' if on_gpus else ''} has {f / 1e12:.3g}"
        for (rank, i), f in list(slow.items())[:NAMED]
    )
    remedy = (
        "nvidia-smi -q -d PERFORMANCE,TEMPERATURE there; leave it out if it stays slow"
        if on_gpus
        else "what else runs there (top)?"
    )
    return Finding("matmul", "fail" if on_gpus else "warn", f"{names}; the median is {text}", remedy)


def _pairs(nodes: Nodes) -> Finding:
    rates = {(i, j): p.bandwidth for i, r in nodes.reports.items() for j, p in r.peers.items() if i < j and p.bandwidth}
    failed = {(i, j): p.slow for i, r in nodes.reports.items() for j, p in r.peers.items() if i < j and p.slow}
    if failed:
        (i, j), why = next(iter(failed.items()))
        more = f"; and {len(failed) - 1} more" if len(failed) > 1 else ""
        text = f"{nodes.name(i)} and {nodes.name(j)} connect, and their all-reduce fails: {why}{more}"
        return Finding(
            "all-reduce",
            "fail",
            text,
            "NCCL_DEBUG=INFO, TORCH_CPP_LOG_LEVEL=INFO say more; MTU and firewall between them",
        )
    if not rates:
        return Finding("all-reduce", "skip", "not measured: no two nodes reach each other")
    backend = next(iter(nodes.reports.values())).backend
    best = {n: max(rate for pair, rate in rates.items() if n in pair) for n in set().union(*rates)}
    middle = statistics.median_high(best.values())  # one slow node of three makes most pairs slow
    text = f"{_size(middle)}/s between two nodes, {backend}"
    text += f" ({_size(min(rates.values()))} to {_size(max(rates.values()))}/s)" if len(rates) > 1 else ""
    slow = {pair: rate for pair, rate in rates.items() if rate < max(SLOW_PAIR * middle, SLOWEST_LINK)}
    if not slow:
        return Finding("all-reduce", "ok", text)
    shared = set.intersection(*map(set, slow))
    remedy = "ethtool (speed, errors), cable and switch port there; NCCL_IB_HCA; or leave it out"
    if len(shared) == 1 and len(slow) > 1:
        others = set().union(*slow) - shared
        whom = "all others" if len(others) == len(nodes.reports) - 1 else nodes.all(others)
        names = f"{nodes.all(shared)} is slow to {whom}, {_size(min(slow.values()))}/s at worst"
    else:
        shown = sorted(slow, key=lambda pair: slow[pair])[:2]
        names = "; ".join(f"{nodes.name(i)} and {nodes.name(j)}: {_size(slow[i, j])}/s" for i, j in shown)
        names += f"; and {len(slow) - 2} more" * (len(slow) > 2)
    return Finding("all-reduce", "fail", f"slow: {names}; {text}", remedy)


def _kernels(nodes: Nodes) -> Finding:
    if broken := {rank: r.kernel_problem for rank, r in nodes.reports.items() if r.kernel_problem}:
        why = next(iter(broken.values()))
        text = f"{nodes.all(broken)}: {why}; all ranks then take the slower foreach"
        remedy = "install a C compiler (gcc) there, for GPUs Triton; ANON_DIST_CACHE names a folder that can be written"
        return Finding("kernels", "warn", text, remedy)
    first = next((r.kernel for r in nodes.reports.values() if r.kernel), "")
    return Finding("kernels", "ok", first) if first else Finding("kernels", "skip", "not tried")


def _size(number: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} B"
