import re
import time

from stepdistill_jax.training.startup import StartUp


def test_laps_follow_each_other_and_add_up():
    startup = StartUp(began=time.monotonic() - 2.0)
    startup.done("imports")
    time.sleep(0.11)
    startup.done("data")
    line = startup.line()
    total, imports, data = map(float, re.findall(r"[\d.]+", line))
    assert line == f"first step after {total} s: imports {imports}, data {data}"
    assert imports >= 2.0 and data >= 0.1
    assert abs(total - imports - data) < 0.11  # each is rounded
