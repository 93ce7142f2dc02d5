"""hivemind's side of benchmarks/averaging.py: one of two peers. Run by the interpreter of an environment of its own.

    python averaging_hivemind.py VALUES UNIT

Prints its address, reads the other's; then for each two lines it reads averages once, prints the seconds from the
trigger, and how far off the mean is.
"""

import json
import sys
import time

import hivemind
import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.control import AveragingStage
from hivemind.utils import get_dht_time

MATCHMAKING_SECONDS = 3.0


def main() -> None:
    """One peer."""
    values, unit = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    if unit == 0:
        dht = hivemind.DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
        print(next(str(one) for one in dht.get_visible_maddrs()), flush=True)
        sys.stdin.readline()
    else:
        dht = hivemind.DHT([sys.stdin.readline().strip()], start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
        print("here", flush=True)
    vector = torch.linspace(-1, 1, values) * (1 + unit)
    averager = DecentralizedAverager(
        [vector], dht, prefix="averaging", target_group_size=2, min_matchmaking_time=MATCHMAKING_SECONDS,
        request_timeout=1.0, start=True,
    )  # fmt: skip
    while sys.stdin.readline().strip():
        with averager.get_tensors() as tensors:
            tensors[0].copy_(vector)
        control = averager.step(
            wait=False, require_trigger=True, scheduled_time=get_dht_time() + MATCHMAKING_SECONDS, timeout=60
        )
        while control.stage != AveragingStage.AWAITING_TRIGGER:
            time.sleep(0.005)
        time.sleep(1.0)  # until the other one has found it, too
        begun = time.perf_counter()
        control.allow_allreduce()
        control.result(timeout=60)
        seconds = time.perf_counter() - begun
        print(json.dumps({"seconds": seconds}), flush=True)
        sys.stdin.readline()
        with averager.get_tensors() as tensors:
            error = float((tensors[0] - torch.linspace(-1, 1, values) * 1.5).abs().max())
        print(json.dumps({"error": error}), flush=True)


if __name__ == "__main__":
    main()
