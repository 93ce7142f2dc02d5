"""Run `python benchmarks/market.py`: the allocative efficiency of the market (benchmarks/market_sessions.py).

It bears the name of a package that all benchmarks import, and Python looks beside a script first. So this file gives
way: a script that asks for `market` from this folder gets the package.
"""

import importlib
import sys
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
if __name__ == "market":
    del sys.modules["market"]
    sys.modules["market"] = importlib.import_module("market")
elif __name__ == "__main__":
    from benchmarks.market_sessions import main

    main()
