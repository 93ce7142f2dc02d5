"""What the commands about jobs do for script jobs: offer one (or its replicas), and collect what it left."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peer.cli_output import Terminal, credits_of, short_id, size_of
from protocol import params

if TYPE_CHECKING:
    from peer.client import Client
    from worker.script_file import ScriptFile

__all__ = ["collect_script", "offer_script"]


def offer_script(
    terminal: Terminal,
    client: Client,
    given: ScriptFile,
    network: bytes,
    terms: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Put the inputs into the daemon's store and offer the script, once for each replica. The jobs. terms:
    money and needs, as `Client.submit` has them."""
    from protocol.codec import encode
    from protocol.script import FileRef, ScriptSpec
    from protocol.task import task_id

    files = []
    for name, path in sorted(given.inputs.items()):
        with terminal.moving(name) as moved:
            files.append(FileRef(name, client.put_blob(path, moved), path.stat().st_size))
    script = ScriptSpec(
        network=network, command=given.command, files=tuple(files), seconds=given.seconds,
        memory_bytes=given.memory_bytes, outputs_bytes=given.outputs_bytes, seed=given.seed, name=given.name,
    )  # fmt: skip
    ScriptSpec.from_bytes(encode(script), network=network)  # what every peer would refuse is refused here
    group = secrets.token_hex(16) if given.replicas > 1 else ""
    most = given.outputs_bytes + params.SANDBOX_LOG_KEPT_BYTES + params.SCRIPT_RESULT_BYTES_MAX + 8
    jobs = [
        client.command(
            "submit", task=encode(script).hex(), base_root=task_id(script).hex(), checkpoint_bytes=most,
            memory_bytes=given.memory_bytes, sandbox=4,
            group=group, replica=replica, **terms,
        )
        for replica in range(given.replicas)
    ]  # fmt: skip
    for job in jobs:
        terminal.record("ichiba.job/1", job)
        terminal.say(
            f"job {short_id(job['job'])} is offered: a script of at most {given.seconds} s at up to "
            f"{credits_of(terms['unit_price_max'])} credits a second ({job['assurance']})"
        )
    return jobs


def collect_script(terminal: Terminal, client: Client, job_id: str, folder: Path) -> None:
    """Write outputs/, log.txt, script.result and proof.json. Every name and hash is checked before it is a file."""
    import json
    import mmap

    from peer.home import Home
    from protocol.bundle import make_bundle
    from protocol.script import parts_of, result_from

    evidence = client.bundle(job_id)
    packed = folder / "script.result"
    with terminal.moving("outputs") as moved:
        client.get_blob(bytes.fromhex(evidence["checkpoint"]), packed, moved)
    with packed.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    result = result_from(data)
    for output, part in parts_of(result, data):
        path = folder / "outputs" / output.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(part)
    end = result.outputs_bytes + result.log_bytes
    (folder / "log.txt").write_bytes(data[result.outputs_bytes : end])
    bundle = make_bundle(evidence, network=Home(terminal.data_dir).network_file.read_text(), state={})
    (folder / "proof.json").write_text(json.dumps(bundle, indent=1) + "\n")
    count = len(result.files)
    terminal.say(f"wrote {folder}/outputs ({count} file(s), {size_of(result.outputs_bytes)}), log.txt and proof.json")
    if evidence["reason"]:
        terminal.say(f"  note: {evidence['reason']}")
