"""Whether the inequalities of DESIGN §8 decide what spreads, over ten seeds of a market. One JSON line last.

    python benchmarks/economy.py [--peers 4000] [--seeds 10] [--json]

stake: the mixed market at multiples of the least stake; the figure is the honest share of solvers at the end.
checking: no frauds, half of the verifiers lazy, at multiples of what makes checking pay; an error is ordered in a tenth
of deals, for at the default rate a jackpot is too rare to be learned from in 150 rounds; the expected sum is the same.
coalition: where the played profit of a solver with friends among the checkers changes sign, and where the formula says.
Baseline: the formulas of protocol/incentives.py.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from fractions import Fraction

from market.economy import CALM_SOLVERS, CALM_VERIFIERS, Economy, Settings, coalition_profit
from protocol.incentives import collusion_break_even, lock_needed
from protocol.network import Rules

STAKES = (900, 1100, 2000)
CHECKING = (900, 1100, 2000)
PRICE = 10**9


def break_even(rate: int, watched: float) -> dict[str, float]:
    """The least share of a coalition that profits at this rate, played by bisection and by formula."""
    rules = Rules()
    drawn = max(rules.check_segments_min, 40 * rate // 1000)
    terms = {
        "gain": rules.gain_permille / 1000, "checked": rate / 1000,
        "stake": lock_needed(rules, PRICE, rate) / PRICE, "verifier": 1.0,
        "audited": rules.audit_permille / 1000 / drawn, "watched": watched,
    }  # fmt: skip
    low, high = 0.0, 1.0
    while high - low > 0.002:
        middle = (low + high) / 2
        if coalition_profit(middle, **terms, deals=4_000_000, seed=1) > 0:
            high = middle
        else:
            low = middle
    exact = collusion_break_even(**{name: Fraction(value).limit_denominator(10**6) for name, value in terms.items()})
    return {"played": round(high, 3), "formula": round(float(exact), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print only the JSON line")
    options = parser.parse_args()
    base = Settings(peers=options.peers)
    calm = replace(base, solver_mix=CALM_SOLVERS, verifier_mix=CALM_VERIFIERS, forced_ppm=100_000)
    found: dict[str, object] = {"benchmark": "economy", "peers": options.peers, "rounds": base.rounds}
    overhead = 0.0
    for what, settings, field, multiples in (
        ("stake", base, "stake_permille", STAKES),
        ("checking", calm, "checking_permille", CHECKING),
    ):
        for permille in multiples:
            ends = [Economy(replace(settings, seed=s, **{field: permille})).play() for s in range(options.seeds)]
            shares = [(end.solvers if what == "stake" else end.verifiers)["honest"] for end in ends]
            found[f"{what}_{permille}"] = {"least": round(min(shares), 3), "most": round(max(shares), 3)}
            overhead = max(overhead, *(end.overhead for end in ends))
            if not options.json:
                print(f"{what} {permille / 1000}: honest {min(shares):.3f} to {max(shares):.3f} at the end", flush=True)
    found["overhead"] = round(overhead, 4)
    for rate in (50, 200):
        for watched in (0.0, 0.2):
            found[f"coalition_{rate}_watched_{watched}"] = break_even(rate, watched)
    print(json.dumps({**found, "seeds": options.seeds, "baseline": "protocol/incentives.py"}))


if __name__ == "__main__":
    main()
