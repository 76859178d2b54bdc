"""What a step and an epoch cost: the card's hours at a price, its energy at most at another.

Energy is bounded by the card's rated power for the whole of the estimated time; the host's own is not in it.
"""

from __future__ import annotations

from planner.hardware import HardwareProfile
from planner.plan import Cost, Spending, Time

JOULES_PER_KWH = 3.6e6


def cost(time: Time, gpu: HardwareProfile, price_per_hour: float | None, power_price_per_kwh: float | None) -> Cost:
    """Cost of what the plan's time tells of; what rests on an unknown number is None, and ``basis`` says why."""
    watts = None if gpu.tdp_w.value is None else float(gpu.tdp_w.value)
    step, hours = time.step_seconds.estimate, time.epoch.hours if time.epoch else None

    def spent(seconds: float | None) -> Spending:
        energy = None if seconds is None or watts is None else watts * seconds / JOULES_PER_KWH
        power = None if energy is None or power_price_per_kwh is None else energy * power_price_per_kwh
        card = None if seconds is None or price_per_hour is None else price_per_hour * seconds / 3600
        return Spending(
            kwh_at_most=_significant(energy), power_cost_at_most=_significant(power), card_cost=_significant(card)
        )

    told = ["at the estimated time"]
    if step is None:
        told = ["the time of a step is unknown, so its cost is"]
    elif watts is None:
        told.append(f"the rated power of {gpu.name} is unknown ({gpu.tdp_w.why}), so its energy is")
    else:
        told.append(f"energy: the card alone at its rated power, {watts:g} W, all the time")
    return Cost(
        price_per_hour=price_per_hour,
        power_price_per_kwh=power_price_per_kwh,
        tdp_watts=watts,
        step=spent(step),
        epoch=spent(None if hours is None else hours * 3600) if time.epoch else None,
        basis="; ".join(told),
    )


def _significant(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
