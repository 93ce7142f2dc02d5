"""`ichiba links`: how slow and how fast the links between peers are, by what both ends report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from peer.cli_output import Terminal, common, write_whole
from protocol import params

__all__ = ["links"]


@click.command()
@click.option("--npz", type=click.Path(dir_okay=False, path_type=Path), help="Write the matrices here.")
@common
def links(terminal: Terminal, npz: Path | None) -> None:
    """The links between peers: delay and speed, of both ends' reports the slower.

    A file of --npz has delay_ms, gbps and known (N x N), for `ichiba placement plan --links FILE`, and peers (N), whose
    rows they are. Of a link that nobody measured it holds a guess, 50 ms and 10 Mbit/s, and known is 0.

    \b
    ichiba links
    ichiba links --npz links.npz
    """
    with terminal.client() as client:
        found = client.command("links")
    if npz is not None:
        write_whole(npz, _arrays(found))
        terminal.note(f"the matrices are in {npz}; next: ichiba placement plan --links {npz} --stages 2 --replicas 1")
    for link in found["links"]:
        terminal.record("ichiba.link/1", link)
    rows = [
        (
            link["one"][-8:],
            link["other"][-8:],
            f"{link['delay_us'] / 1000:.1f} ms",
            f"{link['bytes_per_second'] * 8 / 1e6:,.1f} Mbit/s" if link["speed_known"] else "not known",
            f"{link['said']} of 2",
        )
        for link in found["links"]
    ]
    terminal.table("links", ("peer", "peer", ">delay", ">speed", ">ends that said so"), rows)


def _arrays(found: dict[str, Any]) -> bytes:
    """The .npz file, as bytes."""
    import io

    import numpy as np

    names = sorted({found["me"], *(link[end] for link in found["links"] for end in ("one", "other"))})
    at = {name: row for row, name in enumerate(names)}
    delay = np.full((len(names), len(names)), params.LINK_DELAY_GUESS_US / 1000)
    gbps = np.full((len(names), len(names)), params.LINK_BYTES_PER_SECOND * 8 / 1e9)
    known = np.zeros((len(names), len(names)), np.int8)
    for link in found["links"]:
        one, other = at[link["one"]], at[link["other"]]
        delay[one, other] = delay[other, one] = link["delay_us"] / 1000
        gbps[one, other] = gbps[other, one] = link["bytes_per_second"] * 8 / 1e9
        known[one, other] = known[other, one] = link["said"]
    np.fill_diagonal(delay, 0.0)
    np.fill_diagonal(gbps, params.LINK_SPEED_MAX * 8 / 1e9)
    np.fill_diagonal(known, 2)
    file = io.BytesIO()
    np.savez(file, delay_ms=delay, gbps=gbps, known=known, peers=np.array(names))
    return file.getvalue()
