"""Estimate pi by throwing points; what it leaves in /outputs comes back to the submitter."""

import os
import random

rng = random.Random(int(os.environ["ICHIBA_SEED"]))
points = 400_000
inside = sum(rng.random() ** 2 + rng.random() ** 2 < 1 for _ in range(points))
print(f"pi is about {4 * inside / points:.4f}")
with open(os.path.join(os.environ["ICHIBA_OUTPUTS"], "pi.txt"), "w") as file:
    file.write(f"{4 * inside / points}\n")
