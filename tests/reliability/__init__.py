"""Interruption, faults and hostile input: a harness that harms a real conversion in every way it can think of.

`scene` is the conversion, `disk` watches and spoils what it does on disk, `power` models a power loss, `kills`,
`faults` and `fuzzing` are the experiments. The tests run them in a bounded form, `make torture` in full.
"""
