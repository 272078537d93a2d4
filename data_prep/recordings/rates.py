"""Times that are likely in another unit than microseconds, judged by duration and event rate."""

LONGEST_US = 4 * 3600 * 1_000_000  # a longer recording is unusual
SHORTEST_DOUBTED_US = 60 * 1_000_000
# Events per pixel and second. The noise of a sensor alone is 0.05 to 1; busy scenes reach some 10.
LOWEST_RATE = 0.002
HIGHEST_RATE = 1000.0
HIGHEST_SENSOR_RATE = 2e9  # events per second that no sensor puts out
FEW_EVENTS = 10_000  # so few may come within an instant


def time_unit_warning(events: int, span_us: int, pixels: int) -> str:
    """The warning about a recording whose duration or rate is implausible; empty if they are fine.

    Args:
        events: of the recording.
        span_us: from its first to its last event.
        pixels: of the sensor.
    """
    if events < 2:
        return ""
    rate = events / max(span_us, 1) * 1e6
    if events > FEW_EVENTS and (rate > HIGHEST_SENSOR_RATE or rate / pixels > HIGHEST_RATE):
        return (
            f"{events} events within {span_us} us are {rate:.3g} events/s, more than a sensor puts "
            "out: the times are likely milliseconds or seconds. Multiply them to microseconds"
        )
    is_slow = span_us > SHORTEST_DOUBTED_US and rate / pixels < LOWEST_RATE
    # As nanoseconds they would be 1000 times as dense.
    may_be_ns = rate * 1000 <= HIGHEST_SENSOR_RATE
    if not may_be_ns or (not is_slow and span_us <= LONGEST_US):
        return ""
    return (
        f"{events} events span {span_us / 1e6:.0f} s, {rate:.3g} events/s: the times are likely "
        f"nanoseconds (then they span {span_us / 1e9:.3g} s). Divide them by 1000 to microseconds"
    )
