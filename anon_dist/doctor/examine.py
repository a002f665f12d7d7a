"""What a node does when it is examined: by itself, and with the others in the same order."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
from pathlib import Path

from anon_dist.doctor import local, network, storage
from anon_dist.doctor.meeting import Meeting, NoMeetingError, meet
from anon_dist.doctor.place import Place
from anon_dist.doctor.report import Report
from anon_dist.train.config.parsing import Config

COMPILE_SECONDS = 300.0
STEP_SECONDS = 60.0


def examine(place: Place, config: Config | None, wait: float) -> tuple[Report, Meeting | None]:
    """Look at this node and, as far as they can be met, at what joins it to the others.

    Args:
        place: which node this is.
        config: of the run that is meant; None: run_dir and data are left out.
        wait: seconds for the others to come.
    """
    report, meeting = Report(place.rank, socket.gethostname()), None
    report.devices, report.gpus, report.driver, report.device_problem = local.devices()
    report.backend = "nccl" if report.gpus else "gloo"
    report.versions = local.versions()
    report.unimportable = local.unimportable(None if config is None else config.train.engine)
    report.interface = network.chosen_interface(place, report.backend)
    if place.nodes > 1:
        try:
            meeting = meet(place, wait)
        except NoMeetingError as error:
            report.meeting = str(error)
    try:
        _together(report, config, meeting)
    except Exception as error:  # the store is lost, with its node
        if meeting is None:
            raise
        report.meeting = f"node 0 was lost on the way: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
        meeting = None
    if meeting is not None:
        report.absent = meeting.absent
    return report, meeting


def _together(report: Report, config: Config | None, meeting: Meeting | None) -> None:
    token = secrets.randbits(63)
    if meeting is not None:
        if meeting.place.rank == 0:
            meeting.store.set("token", str(token))
        token = int(meeting.store.get("token"))
    fit = set[tuple[int, int]]()
    if meeting is not None and len(meeting.present) > 1:
        fit = _reach(report, meeting, token)
    if config is not None and not report.meeting:
        report.folder = storage.try_folder(Path(config.run_dir), token, meeting)
        if report.rank == 0 and config.checkpoint.remote is not None:
            report.remote = config.checkpoint.remote
            report.remote_problem, report.remote_remedy = storage.try_address(config)
        report.data, report.data_problem, report.data_remedy = storage.data_of(config)
    report.kernel, report.kernel_problem = local.kernel()
    if meeting is not None:
        meeting.all_at("the optimizer's kernel", COMPILE_SECONDS)
    report.flops = local.multiply()
    if meeting is not None:
        meeting.all_at("the matrix product", STEP_SECONDS)
        network.measure_pairs(meeting, report.backend, report.peers, fit)


def _reach(report: Report, meeting: Meeting, token: int) -> set[tuple[int, int]]:
    """Reach all others into the report; the pairs that reach each other both ways."""
    mine = report.rank
    with contextlib.ExitStack() as stack:
        ports, address = list[int](), report.interface.address if not report.interface.problem else ""
        if address:
            try:
                ports = stack.enter_context(network.listening(mine, token, address))
            except OSError as error:
                report.interface.problem, address = f"nothing can listen at {address}: {error.strerror}", ""
        meeting.tell("an address", json.dumps([address, ports, report.backend]))
        told = {r: json.loads(text) for r, text in meeting.hear("an address", STEP_SECONDS).items()}
        report.peers = network.reach({r: (a, p) for r, (a, p, _) in told.items() if r != mine}, token)
        if {backend for *_, backend in told.values()} != {"nccl"}:
            report.backend = "gloo"
        meeting.tell("whom it reaches", json.dumps([r for r, p in report.peers.items() if not (p.problem or p.closed)]))
        reached = {r: json.loads(text) for r, text in meeting.hear("whom it reaches", STEP_SECONDS).items()}
    return {(i, j) for i in reached for j in reached[i] if i < j and i in reached.get(j, [])}
