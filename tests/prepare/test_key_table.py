import random

from megatron_prime.prepare.key_table import KeyTable


def test_it_holds_what_a_dictionary_holds():
    rng = random.Random(0)
    table, truth = KeyTable(slots=4), {}
    for value in range(20_000):
        key = rng.choice([rng.getrandbits(64), rng.getrandbits(8), rng.getrandbits(10) << 54])
        table.add(key, value)
        truth.setdefault(key or 1, value)  # 0 and 1 are one key
    assert len(table) == len(truth)
    assert all(table.get(key) == value for key, value in truth.items())
    unknown = [key for key in (rng.getrandbits(64) for _ in range(1000)) if key not in truth]
    assert all(table.get(key) is None for key in unknown)


def test_a_key_costs_18_to_36_bytes():
    rng, table = random.Random(1), KeyTable()
    for value in range(100_000):
        table.add(rng.getrandbits(64), value)
        if value > 5000:
            assert 18 <= table.nbytes / len(table) <= 36.1
